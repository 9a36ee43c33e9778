"""A row of a request, between the loop that waits for it and the thread that answers it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from rc_agents.service import GenerationParams, GenerationResult, Prompt, TokenRecord

from .errors import Refused


@dataclass(eq=False)
class Job:
    """One row: a prompt, what comes of it, and whether anybody still wants it.

    Args:
        prompt: rendered.
        params: its own.
        deadline: of `time.monotonic`.
        asker: who takes turns with the others.
        reads: whether the prompt's own tokens are scored too, into `read`.
    """

    prompt: Prompt
    params: GenerationParams
    deadline: float
    asker: str = ""
    turn: int = 0
    reads: bool = False
    read: tuple[TokenRecord, ...] = ()
    cancel: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.monotonic)
    first: float | None = None
    begun: float | None = None
    answered: bool = False
    ended: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _pieces: asyncio.Queue[object] = field(default_factory=asyncio.Queue)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def put(self, piece: object) -> None:
        """Hands something to whoever waits, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed; nobody waits
            self.cancel.set()

    def timed(self) -> GenerationParams:
        """Returns the row's parameters with the time that it has left."""
        return replace(self.params, timeout=max(self.left, 1e-3))

    def text(self, text: str) -> None:
        """Hands on text that has come."""
        if self.first is None:
            self.first = time.monotonic()
        self.put(text)

    async def pieces(self) -> AsyncIterator[str | GenerationResult]:
        """Texts as they come, then the result.

        Raises:
            Refused, RCError: what went wrong; 504 where the deadline passes before the row is begun.
        """
        while True:
            piece = await self._wait()
            if isinstance(piece, BaseException):
                raise piece
            if isinstance(piece, (str, GenerationResult)):
                yield piece
                if isinstance(piece, GenerationResult):
                    return

    async def _wait(self) -> object:
        while not self.begun:
            try:
                return await asyncio.wait_for(self._pieces.get(), max(self.left, 0.0))
            except TimeoutError:
                if not self.begun:
                    self.cancel.set()
                    said = "the deadline passed while this request waited"
                    raise Refused(504, said, code="timeout") from None
        return await self._pieces.get()
