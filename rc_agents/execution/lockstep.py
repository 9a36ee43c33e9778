"""All models in one OS thread, one greenlet each: gradients, autocast and inference mode just work."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import Any

import greenlet
from torch import Tensor

from ..backbone import ARRIVE
from .protocol import Meet, Stream, check_order, fail, missed


def run_lockstep(streams: Sequence[Stream], num_sites: int, meet: Meet) -> dict[str, Any]:
    """Runs every stream up to each site in turn, exchanges, and goes on.

    Args:
        streams: the models that take part.
        num_sites: how often they meet.
        meet: the exchange.

    Returns:
        What each model's forward returned, by name.

    Raises:
        ModelRunError: a model or bridge failed; the next call works.
    """
    hub = greenlet.getcurrent()
    outputs: dict[str, Any] = {}
    runs = {stream.name: _spawn(stream, hub, outputs) for stream in streams}
    waiting: dict[str, Tensor | None] = dict.fromkeys(runs)
    try:
        for site in range(num_sites + 1):
            arrived = {
                name: _advance(name, run, waiting[name], site, num_sites)
                for name, run in runs.items()
            }
            if site < num_sites:
                waiting = dict(meet(site, arrived))
    finally:
        for run in runs.values():
            if not run.dead:
                run.throw(greenlet.GreenletExit)
    return outputs


def _spawn(stream: Stream, hub: greenlet.greenlet, outputs: dict[str, Any]) -> greenlet.greenlet:
    def body(_: Any) -> None:
        ARRIVE.set(lambda site, hidden: hub.switch((site, hidden)))
        outputs[stream.name] = stream.run()

    run = greenlet.greenlet(body, parent=hub)
    run.gr_context = contextvars.copy_context()
    return run


def _advance(
    name: str, run: greenlet.greenlet, hidden: Tensor | None, site: int, num_sites: int
) -> Any:
    try:
        arrived = run.switch(hidden)
    except Exception as error:
        fail(name, error)
    if run.dead:
        if site < num_sites:
            raise missed(name, site)
        return None
    check_order(name, arrived[0], site)
    return arrived[1]
