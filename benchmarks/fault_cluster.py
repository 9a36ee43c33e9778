"""An ensemble in processes that are struck, and the same ensemble in this process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
from rc_agents.benchmarks.fault_relay import Relay

import rc_agents
from rc_agents.nodes import Node, NodeSettings, connect

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rc_agents.nodes", "transformers.models.auto.modeling_auto"])


def serve(folder: str, name: str, anchor: tuple[str, int], settings: NodeSettings) -> None:
    """The body of a specialist's process."""
    torch.set_num_threads(1)
    with contextlib.suppress(rc_agents.RCError):
        Node(folder, name, settings=settings).serve(anchor, patience=20.0)


@dataclass
class Specialist:
    """One specialist's process, and the relay between it and the anchor's."""

    name: str
    process: Any
    relay: Relay


class Cluster:
    """An ensemble in processes on loopback, each behind a relay, and the same ensemble in this process.

    Args:
        folder: its checkpoint.
        settings: of its processes.
    """

    def __init__(self, folder: str, settings: NodeSettings) -> None:
        self.folder, self.settings = folder, settings
        self.single = rc_agents.CoupledForCausalLM.from_pretrained(folder)
        self.model = connect(folder, settings=settings, wait=None)
        self.hub: Any = self.model.elsewhere
        self.specialists = {name: self._start(name) for name in self.model.specialists}
        self.hub.wait_for(self.specialists, 60.0)

    def _start(self, name: str, relay: Relay | None = None) -> Specialist:
        relay = relay or Relay(self.hub.door.address)
        arguments = (self.folder, name, relay.address, self.settings)
        process = PROCESSES.Process(target=serve, args=arguments, daemon=True)
        process.start()
        return Specialist(name, process, relay)

    def strike(self, name: str, kind: str, seconds: float) -> None:
        """Does it."""
        one = self.specialists[name]
        if kind == "kill":
            os.kill(one.process.pid, signal.SIGKILL)
        elif kind == "stop":
            os.kill(one.process.pid, signal.SIGSTOP)
        elif kind == "cut":
            one.relay.swallows = True
        elif kind == "reset":
            one.relay.reset()
        elif kind == "stall":
            one.relay.held_until = time.monotonic() + seconds

    def mend(self, name: str, kind: str) -> None:
        """Takes the fault away and waits until the specialist is back."""
        one = self.specialists[name]
        if kind == "kill":
            one.process.join(10.0)
            self.specialists[name] = self._start(name, one.relay)
        elif kind == "stop":
            os.kill(one.process.pid, signal.SIGCONT)
        elif kind == "cut":
            one.relay.reset()
            one.relay.swallows = False
        self.hub.wait_for([name], 60.0)

    def close(self) -> None:
        """Ends all processes that it started."""
        self.hub.close()
        for one in self.specialists.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.process.pid, signal.SIGKILL)
            one.process.join(10.0)
            one.relay.close()
