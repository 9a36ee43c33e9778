"""Where other processes come in: a thread that listens, checks who comes, and hands over the links."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from ..execution.wire import Channel, Frame, LinkError, NotYet
from .handshake import admit, next_frame
from .settings import NodeSettings

logger = logging.getLogger(__name__)
VISITORS = 32  # that may be in the middle of a handshake at once


class Door:
    """Listens until it is closed; every visitor gets a thread of its own for as long as the handshake takes.

    Args:
        server: a listening socket.
        settings: secret and seconds.
        welcome: what is done with a link and the hello that came on it; may raise `LinkError` to refuse.
    """

    def __init__(
        self,
        server: socket.socket,
        settings: NodeSettings,
        welcome: Callable[[Channel, Frame], None],
    ) -> None:
        self.server, self.settings, self.welcome = server, settings, welcome
        self.closed = False
        self.room = threading.BoundedSemaphore(VISITORS)
        # Wakes a process that waits for frames when somebody has come in.
        self.bell, self._ring = os.pipe()
        os.set_blocking(self.bell, False)
        threading.Thread(target=self._listen, daemon=True, name="rc_agents door").start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.server.getsockname()[:2]
        return host, port

    def _listen(self) -> None:
        while not self.closed:
            try:
                sock, _ = self.server.accept()
            except OSError:  # closed, or out of descriptors for now
                time.sleep(0.05)
                continue
            if not self.room.acquire(blocking=False):
                sock.close()
                continue
            try:
                threading.Thread(target=self._receive, args=(sock,), daemon=True).start()
            except RuntimeError:
                self.room.release()
                sock.close()

    def _receive(self, sock: socket.socket) -> None:
        who = "a visitor"
        try:
            admit(sock, self.settings.secret, self.settings.join)
            channel = Channel(sock, who, self.settings.deadline)
            hello = next_frame(channel, self.settings.join)
            who = channel.name = str(hello.fields.get("name"))
            try:
                self.welcome(channel, hello)
            except LinkError as error:
                again = isinstance(error, NotYet)
                channel.send(Frame("refused", {"reason": str(error), "again": again}))
                raise
            self.ring()
        except (LinkError, OSError, KeyError, TypeError, ValueError) as error:
            log = logger.info if isinstance(error, NotYet) else logger.warning
            log("%s was turned away: %s", who, error)
            with contextlib.suppress(OSError):
                sock.close()
        finally:
            self.room.release()

    def ring(self) -> None:
        """Wakes whoever waits for frames."""
        with contextlib.suppress(OSError):
            os.write(self._ring, b"1")

    def heard(self) -> None:
        """Takes the rings off the bell."""
        with contextlib.suppress(BlockingIOError, OSError):
            while os.read(self.bell, 64):
                pass

    def close(self) -> None:
        """Stops listening."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        bells, self.bell, self._ring = (self.bell, self._ring), -1, -1
        for one in bells:
            if one >= 0:
                os.close(one)
