"""Relays between specialists and the anchor, all on loopback, that forward bytes until they are told to do worse."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time


class Relay:
    """Forwards the connections to one address, until it is told to do worse.

    Args:
        target: host and port that it forwards to.
    """

    namespace: str | None = None
    host = "127.0.0.1"

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.swallows = False
        self.held_until = 0.0
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Where to connect."""
        host, port = self.server.getsockname()[:2]
        return host, port

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self.target, timeout=5.0)
            except OSError:
                near.close()
                continue
            pair = (near, far)
            for sock in pair:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.pairs.append(pair)
            for source, sink in (pair, pair[::-1]):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while select.select([source], [], [])[0]:
                data = source.recv(1 << 18)
                if not data:
                    break
                if self.swallows:
                    continue
                time.sleep(max(0.0, self.held_until - time.monotonic()))
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def strike(self, kind: str, seconds: float) -> None:
        """Does what a fault's kind says; a stall takes so many seconds."""
        if kind == "cut":
            self.swallows = True
        elif kind == "reset":
            self.reset()
        elif kind == "stall":
            self.held_until = time.monotonic() + seconds

    def mend(self, kind: str) -> None:
        """Forwards again."""
        if kind == "cut":
            self.reset()
            self.swallows = False

    def reset(self) -> None:
        """Closes every connection."""
        pairs, self.pairs = self.pairs, []
        for sock in [sock for pair in pairs for sock in pair]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stops."""
        self.reset()
        self.server.close()


class Loopback:
    """Where everybody listens on 127.0.0.1, and each specialist joins through a relay."""

    kinds = ("kill", "stop", "cut", "reset", "stall")
    listen = "127.0.0.1:0"
    secret = b""

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is to be entered."""
        return contextlib.nullcontext()

    def link(self, door: tuple[str, int]) -> Relay:
        """Returns a relay to the anchor's door."""
        return Relay(door)
