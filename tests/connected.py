"""Ensembles whose specialists run elsewhere: in threads of the tests' process, or in processes of their own."""

import multiprocessing
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rc_agents import CoupledForCausalLM
from rc_agents.nodes import Node, NodeSettings, connect

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.connected", "transformers.models.auto.modeling_auto"])


@contextmanager
def connected(
    one: CoupledForCausalLM, settings: NodeSettings | None = None, **options: Any
) -> Iterator[CoupledForCausalLM]:
    """The same ensemble, with every specialist behind a link of its own, in a thread."""
    settings = settings or NodeSettings(deadline=20.0)
    with tempfile.TemporaryDirectory() as folder:
        one.save_pretrained(folder, include_bases=True)
        model = connect(folder, settings=settings, wait=None, **options)
        hub: Any = model.elsewhere
        nodes = [Node(folder, name, settings=settings) for name in one.specialists]
        threads = [
            threading.Thread(target=node.serve, args=(hub.door.address,), kwargs={"once": True})
            for node in nodes
        ]
        try:
            for thread in threads:
                thread.start()
            hub.wait_for(one.specialists, 20.0)
            yield model
        finally:
            hub.close()
            for node, thread in zip(nodes, threads, strict=True):
                node.close()
                thread.join(20.0)
            assert not any(thread.is_alive() for thread in threads)


def run_node(folder: str, name: str, anchor: tuple[str, int], settings: NodeSettings) -> None:
    """The body of a specialist's process."""
    torch.set_num_threads(1)
    node = Node(folder, name, settings=settings)
    node.serve(anchor, once=True)


def start_node(folder: str, name: str, anchor: tuple[str, int], settings: NodeSettings) -> Any:
    """Starts a specialist's process."""
    process = PROCESSES.Process(target=run_node, args=(folder, name, anchor, settings), daemon=True)
    process.start()
    return process
