"""An ensemble in processes that are struck, and the same ensemble in this process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from dataclasses import dataclass, replace
from typing import Any

import torch
from rc_agents.benchmarks.fault_relay import Loopback, Relay
from rc_agents.benchmarks.fault_segment import Cable, Segment, entered

import rc_agents
from rc_agents.nodes import Node, NodeSettings, connect

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rc_agents.nodes", "transformers.models.auto.modeling_auto"])


def serve(
    folder: str,
    name: str,
    anchor: tuple[str, int],
    settings: NodeSettings,
    host: str = "127.0.0.1",
    namespace: str | None = None,
) -> None:
    """The body of a specialist's process."""
    torch.set_num_threads(1)
    with (
        entered(namespace) if namespace else contextlib.nullcontext(),
        contextlib.suppress(rc_agents.RCError),
    ):
        node = Node(folder, name, settings=settings, listen=(host, 0))
        node.serve(anchor, patience=600.0)  # a busy machine may take minutes until a link is mended


@dataclass
class Specialist:
    """One specialist's process, and what is between it and the others."""

    name: str
    process: Any
    link: Relay | Cable


class Cluster:
    """An ensemble in processes of their own, and the same ensemble in this process.

    Args:
        folder: its checkpoint.
        settings: of its processes; the network adds the secret.
        network: what is between the processes: relays on loopback, or a segment of namespaces.

    Attributes:
        kinds: of faults that the network can do.
    """

    def __init__(
        self, folder: str, settings: NodeSettings, network: Loopback | Segment | None = None
    ) -> None:
        network = network or Loopback()
        self.kinds = network.kinds
        self.folder, self.settings = folder, replace(settings, secret=network.secret)
        self.single = rc_agents.CoupledForCausalLM.from_pretrained(folder)
        with network.entered():
            self.model = connect(folder, listen=network.listen, settings=self.settings, wait=None)
        self.hub: Any = self.model.elsewhere
        self.specialists: dict[str, Specialist] = {}
        try:
            for name in self.model.specialists:
                self.specialists[name] = self._start(name, network.link(self.hub.door.address))
            self.hub.wait_for(self.specialists, 60.0)
        except BaseException:
            self.close()
            raise

    def _start(self, name: str, link: Relay | Cable) -> Specialist:
        arguments = (self.folder, name, link.address, self.settings, link.host, link.namespace)
        process = PROCESSES.Process(target=serve, args=arguments, daemon=True)
        process.start()
        return Specialist(name, process, link)

    def strike(self, name: str, kind: str, seconds: float) -> None:
        """Does it."""
        one = self.specialists[name]
        if kind == "kill":
            os.kill(one.process.pid, signal.SIGKILL)
        elif kind == "stop":
            os.kill(one.process.pid, signal.SIGSTOP)
        else:
            one.link.strike(kind, seconds)

    def mend(self, name: str, kind: str) -> None:
        """Takes the fault away and waits until the specialist is back."""
        one = self.specialists[name]
        if kind == "kill":
            one.process.join(10.0)
            self.specialists[name] = self._start(name, one.link)
        elif kind == "stop":
            os.kill(one.process.pid, signal.SIGCONT)
        else:
            one.link.mend(kind)
        self.hub.wait_for([name], 60.0)

    def close(self) -> None:
        """Ends all processes that it started."""
        self.hub.close()
        for one in self.specialists.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.process.pid, signal.SIGKILL)
            one.process.join(10.0)
            one.link.close()
