"""A link of set bandwidth and latency between two network namespaces, made and removed again.

Bandwidth by the kernel's token bucket filter (tbf) at both ends of a veth pair. Latency by a relay beside the anchor,
as not every kernel has netem: bytes go on in order at the time they came plus the delay, at the throughput they came
with. TCP ends at the relay, so what a long round trip does to TCP itself (slow start, recovery after a loss) is not in
the figures.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ANCHOR_HOST, SPECIALIST_HOST = "10.231.0.1", "10.231.0.2"
"""Addresses in the two namespaces, which nothing outside them sees."""

PROCESSES = multiprocessing.get_context("fork")


class CannotShape(Exception):
    """Namespaces or queueing disciplines cannot be made here; the message says why."""


def command(*words: str) -> None:
    """Runs a command of iproute2; raises `CannotShape` with what it says."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotShape(f"{words[0]} does not run: {error}") from error
    if done.returncode:
        raise CannotShape(f"'{' '.join(words)}' says: {done.stderr.strip() or done.returncode}")


@dataclass(frozen=True)
class Namespaces:
    """Two network namespaces with a veth pair between them.

    Args:
        anchor, specialist: their names.
        devices: of each, its end of the pair.
    """

    anchor: str
    specialist: str
    devices: tuple[str, str] = ("rca", "rcb")

    def shape(self, up: float, down: float) -> None:
        """Sets bits a second from the specialist (`up`) and to it (`down`)."""
        ends = zip((self.anchor, self.specialist), self.devices, (down, up), strict=True)
        for namespace, device, rate in ends:
            burst = max(16_000, round(rate / 8 / 500))  # 2 ms
            words = ["tbf", "rate", f"{rate:.0f}bit", "burst", str(burst), "latency", "1s"]
            command("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *words)


@contextlib.contextmanager
def namespaces() -> Iterator[Namespaces]:
    """Makes the namespaces and removes them again; raises `CannotShape` where it may not."""
    tag = f"rc-links-{os.getpid()}"
    made = Namespaces(f"{tag}-a", f"{tag}-b")
    both = (made.anchor, made.specialist)
    try:
        for namespace in both:
            command("ip", "netns", "add", namespace)
        near, far = made.devices
        pair = ["type", "veth", "peer", "name", far, "netns", made.specialist]
        command("ip", "link", "add", near, "netns", made.anchor, *pair)
        for namespace, device, host in zip(
            both, made.devices, (ANCHOR_HOST, SPECIALIST_HOST), strict=True
        ):
            command("ip", "-n", namespace, "addr", "add", f"{host}/30", "dev", device)
            for name in ("lo", device):
                command("ip", "-n", namespace, "link", "set", name, "up")
        yield made
    finally:
        for namespace in both:  # the pair goes with them
            with contextlib.suppress(CannotShape):
                command("ip", "netns", "del", namespace)


class Delay:
    """A relay in a process of its own that holds every byte back for a while, each way.

    It is forked: make it before this process has threads.

    Args:
        host: where it listens, at any port; it forwards to a port of loopback that `to` names.
    """

    def __init__(self, host: str) -> None:
        self.seconds = PROCESSES.Value("d", 0.0)
        self.port = PROCESSES.Value("i", 0)
        self.resets = PROCESSES.Value("i", 0)
        self.server = socket.create_server((host, 0))
        self.address: tuple[str, int] = self.server.getsockname()[:2]
        self.process = PROCESSES.Process(target=self._run, daemon=True)
        self.process.start()

    def to(self, port: int) -> None:
        """Forwards what connects from now on to another port."""
        self.port.value = port

    def set(self, seconds: float) -> None:
        """Sets the delay of each way, and closes the connections, so that they begin anew."""
        self.seconds.value = seconds
        self.resets.value += 1

    def close(self) -> None:
        """Ends its process."""
        self.process.kill()
        self.process.join(10.0)
        self.server.close()

    def _run(self) -> None:
        pairs: list[tuple[socket.socket, socket.socket]] = []
        seen = 0
        while os.getppid() != 1:
            if self.resets.value != seen:
                seen = self.resets.value
                for sock in [sock for pair in pairs for sock in pair]:
                    _shut(sock)
                pairs.clear()
            if not select.select([self.server], [], [], 0.1)[0]:
                continue
            near, _ = self.server.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self.port.value), timeout=5.0)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                forward(source, sink, lambda: float(self.seconds.value))


def forward(source: socket.socket, sink: socket.socket, delay: Any) -> None:
    """Starts two threads: one takes bytes in and notes when they are due, the other sends them on then."""
    held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def take() -> None:
        data = b"first"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            held.put((time.monotonic() + delay(), data))

    def give() -> None:
        due, data = held.get()
        with contextlib.suppress(OSError):
            while data:
                time.sleep(max(0.0, due - time.monotonic()))
                sink.sendall(data)
                due, data = held.get()
        _shut(source)
        _shut(sink)

    for body in (take, give):
        threading.Thread(target=body, daemon=True).start()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
