"""A pass of a graph, level by level: the nodes of one level do not meet, so they may run at once."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..execution.threads import WORKERS, torch_state
from ..execution.wire import LinkError
from . import pooling
from .frozen import Hear
from .latent import Hear as LatentHear
from .latent import Heard
from .signals import Run, Signals

if TYPE_CHECKING:
    from .model import LatentGraph

logger = logging.getLogger(__name__)


def signals(
    graph: LatentGraph, run: Run, names: Container[str], without: Sequence[str] = ()
) -> Signals:
    """Runs nodes level by level.

    Args:
        graph: whose nodes run.
        run: where their states come from.
        names: the nodes to run; those they hear must be among them.
        without: nodes that show nothing.
    """
    found = Signals()
    for level in graph.config.levels:
        chosen = [name for name in level if name in names]
        for name, shown in zip(chosen, _level(graph, chosen, run, found), strict=True):
            cut = name in without
            found.shown[name] = torch.zeros_like(shown) if cut else shown
            if name in graph.encode:
                found.written[name] = graph.encode[name](found.shown[name])
    return found


def _level(graph: LatentGraph, names: Sequence[str], run: Run, found: Signals) -> list[Tensor]:
    """Returns what the nodes of one level show: at once under threads, and those in other processes always."""
    hears = {name: hearing(graph, name, found) for name in names}
    apart = [name for name in names if graph.schedule == "threads" or name in graph.remote]
    if len(apart) == len(names):
        apart = apart[1:]  # one in this thread
    enter = torch_state()

    def work(name: str) -> Tensor:
        with enter():
            return _shown(graph, name, run, hears[name], found)

    waits = {name: WORKERS.submit(work, name) for name in apart}
    here = {name: contextvars.copy_context().run(work, name) for name in names if name not in waits}
    return [waits[name].result() if name in waits else here[name] for name in names]


def hearing(graph: LatentGraph, name: str, found: Signals) -> Hear | None:
    """Returns what a node hears, as what is added to the states that hear; None for one that hears nobody."""
    if name not in graph.hear:
        return None
    module: Any = graph.hear[name]
    if isinstance(module, LatentHear):
        found.latent[name], found.weights[name] = module.latent(found.written)
    return Heard(module, module.said(found.written, found.shown))


def _shown(graph: LatentGraph, name: str, run: Run, hear: Hear | None, found: Signals) -> Tensor:
    try:
        states_BTD, mask_BT = run.states(name, hear)
    except LinkError as error:
        if graph.training or graph.strict:
            raise
        logger.warning("%s; the graph answers without it", error)
        found.lost[name] = str(error)
        return torch.zeros(run.rows, graph.widths[name])
    return pooled(graph, name, states_BTD, mask_BT)


def pooled(graph: LatentGraph, name: str, states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns what a node shows of its states, (B, D) in float32."""
    kind = graph.config.nodes[name].pooling
    if kind == "attention":
        pool: Any = graph.pools[name]
    else:
        pool = pooling.last if kind == "last" else pooling.mean
    shown_BD: Tensor = pool(states_BTD, mask_BT.to(states_BTD.device)).float()
    return shown_BD
