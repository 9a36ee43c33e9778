"""A network of its own for an ensemble: the anchor and every specialist in a network namespace, on one switch.

The switch is a bridge device in the anchor's namespace, and each specialist is on it by a veth pair: states between two
specialists pass the kernel there, and no process of ours. Setting a specialist's end down cuts it off from everybody,
as a pulled cable does; no process is told of it. Linux with iproute2, as root.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rc_agents.benchmarks import shaped

NEEDS = "root, network namespaces, veth and bridge devices on Linux with iproute2"
_NEWNET = 0x40000000  # CLONE_NEWNET of setns(2), which Python has from 3.12 on
_tags = itertools.count()


@contextlib.contextmanager
def entered(namespace: str) -> Iterator[None]:
    """Has this thread, its sockets and the threads that it starts meanwhile in a network namespace."""
    with (
        open("/proc/thread-self/ns/net", "rb") as before,
        open(f"/run/netns/{namespace}", "rb") as there,
    ):
        _move_to(there)
        try:
            yield
        finally:
            _move_to(before)


def _move_to(namespace: Any) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NEWNET):
        raise shaped.CannotShape(f"setns says: {os.strerror(ctypes.get_errno())}")


@dataclass(frozen=True)
class Cable:
    """A specialist's namespace, and its end of the veth pair to the switch.

    Attributes:
        address: where the specialist's process joins.
        namespace: where it runs.
        host: its own address.
    """

    address: tuple[str, int]
    namespace: str
    host: str

    def strike(self, kind: str, seconds: float) -> None:
        """Sets the link down."""
        assert kind == "down"
        self._set("down")

    def mend(self, kind: str) -> None:
        """Sets it up again."""
        self._set("up")

    def _set(self, state: str) -> None:
        shaped.command("ip", "-n", self.namespace, "link", "set", "cable", state)

    def close(self) -> None:
        """Nothing: the pair goes with the namespace."""


@dataclass
class Segment:
    """The switch, and the namespaces on it.

    Attributes:
        kinds: of faults that it can do.
        tag: what all their names begin with.
        listen: where the anchor's process opens its door.
        secret: of the processes, as they listen beyond loopback.
        specialists: namespaces.
    """

    kinds: ClassVar[tuple[str, ...]] = ("down",)

    tag: str
    listen: str = "10.231.0.1:0"
    secret: bytes = field(default_factory=lambda: os.urandom(32), repr=False)
    specialists: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The namespace of the anchor's end."""
        return f"{self.tag}-a"

    def begin(self) -> None:
        """Makes the switch."""
        shaped.command("ip", "netns", "add", self.anchor)
        shaped.command("ip", "-n", self.anchor, "link", "add", "switch", "type", "bridge")
        host = self.listen.partition(":")[0]
        _raise(self.anchor, "switch", host)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Has this thread where the anchor's process opens its door."""
        return entered(self.anchor)

    def link(self, door: tuple[str, int]) -> Cable:
        """Puts one more specialist on the switch.

        Args:
            door: where it joins.
        """
        number = len(self.specialists) + 1
        made = Cable(door, f"{self.tag}-{number}", f"10.231.0.{number + 1}")
        self.specialists.append(made.namespace)
        shaped.command("ip", "netns", "add", made.namespace)
        port = f"port{number}"
        pair = ["type", "veth", "peer", "name", "cable", "netns", made.namespace]
        shaped.command("ip", "link", "add", port, "netns", self.anchor, *pair)
        shaped.command("ip", "-n", self.anchor, "link", "set", port, "master", "switch", "up")
        _raise(made.namespace, "cable", made.host)
        return made

    def close(self) -> None:
        """Removes the namespaces, and with them everything in them."""
        for namespace in (*self.specialists, self.anchor):
            with contextlib.suppress(shaped.CannotShape):
                shaped.command("ip", "netns", "del", namespace)


def _raise(namespace: str, device: str, host: str) -> None:
    """Gives a device its address, and sets it and loopback up."""
    shaped.command("ip", "-n", namespace, "addr", "add", f"{host}/24", "dev", device)
    for name in ("lo", device):
        shaped.command("ip", "-n", namespace, "link", "set", name, "up")


@contextlib.contextmanager
def segment() -> Iterator[Segment]:
    """Makes a network and removes it again; raises `CannotShape` where it may not."""
    made = Segment(f"rc-faults-{os.getpid()}-{next(_tags)}")
    try:
        made.begin()
        yield made
    finally:
        made.close()
