"""Ensembles whose specialists run elsewhere: in threads of the tests' process."""

import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rc_agents import CoupledForCausalLM
from rc_agents.nodes import Node, NodeSettings, connect


@contextmanager
def connected(
    one: CoupledForCausalLM, settings: NodeSettings | None = None, **options: Any
) -> Iterator[CoupledForCausalLM]:
    """The same ensemble, with every specialist behind a link of its own, in a thread."""
    with linked(one, settings, **options) as (model, _):
        yield model


@contextmanager
def linked(
    one: CoupledForCausalLM, settings: NodeSettings | None = None, **options: Any
) -> Iterator[tuple[CoupledForCausalLM, dict[str, Node]]]:
    """The same as `connected`, and the specialists' sides by name."""
    with tempfile.TemporaryDirectory() as folder:
        one.save_pretrained(folder, include_bases=True)
        with served(folder, one.specialists, settings, **options) as both:
            yield both


@contextmanager
def served(
    folder: str, names: Sequence[str], settings: NodeSettings | None = None, **options: Any
) -> Iterator[tuple[CoupledForCausalLM, dict[str, Node]]]:
    """The ensemble of a checkpoint with these specialists behind links, and their sides by name."""
    settings = settings or NodeSettings(deadline=20.0)
    model = connect(folder, settings=settings, wait=None, **options)
    hub: Any = model.elsewhere
    nodes = [Node(folder, name, settings=settings) for name in names]
    threads = [
        threading.Thread(target=node.serve, args=(hub.door.address,), kwargs={"once": True})
        for node in nodes
    ]
    try:
        for thread in threads:
            thread.start()
        hub.wait_for(names, 20.0)
        yield model, dict(zip(names, nodes, strict=True))
    finally:
        hub.close()
        for node, thread in zip(nodes, threads, strict=True):
            node.close()
            thread.join(20.0)
        assert not any(thread.is_alive() for thread in threads)
