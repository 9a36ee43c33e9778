"""One thread that answers what waits, several rows in one `generate` call.

Requests join at request boundaries: a call takes the rows that wait when it begins, in order of arrival, as many as fit
side by side, and the next call begins when the last of them has ended. A row whose client has gone ends within one
token.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

from rc_agents import RCError
from rc_agents.service import GenerationParams, GenerationResult, GenerationService, Prompt

from .errors import Refused
from .limits import Limits

END = object()


@dataclass(eq=False)
class Job:
    """One row: a prompt, what comes of it, and whether anybody still wants it.

    Args:
        prompt: rendered.
        params: its own.
        deadline: of `time.monotonic`.
    """

    prompt: Prompt
    params: GenerationParams
    deadline: float
    cancel: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.monotonic)
    first: float | None = None
    ended: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _pieces: asyncio.Queue[object] = field(default_factory=asyncio.Queue)

    def put(self, piece: object) -> None:
        """Hands something to whoever waits, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed; nobody waits
            self.cancel.set()

    async def pieces(self) -> AsyncIterator[str | GenerationResult]:
        """Texts as they come, then the result.

        Raises:
            Refused, RCError: what went wrong.
        """
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if isinstance(piece, (str, GenerationResult)):
                yield piece
                if isinstance(piece, GenerationResult):
                    return


class Batcher:
    """Answers jobs.

    Args:
        service: of the ensemble.
        limits: rows a call, rows that wait, seconds to end.
        observe: told of every call's rows, before it runs.
    """

    def __init__(
        self, service: GenerationService, limits: Limits, observe: Callable[[int], None]
    ) -> None:
        self._service, self._limits, self._observe = service, limits, observe
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._pace = 1.0  # seconds a call has taken lately
        self._thread = threading.Thread(target=self._work, name="rc_agents-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows that are being answered and that somebody still wants."""
        return sum(not one.cancel.is_set() for one in self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts a request's rows into the queue, all or none.

        Raises:
            Refused: the queue is full (429, with the time after which to try again), or the server stops (503).
        """
        with self._changed:
            if self._closing:
                raise Refused(503, "the server is stopping", code="stopping")
            waiting = sum(not one.cancel.is_set() for one in self._waiting)
            if waiting + len(jobs) > self._limits.queue:
                wait = max(1, round(self._pace * (1 + waiting / self._limits.batch)))
                raise Refused(
                    429,
                    f"{waiting} answers wait and the queue holds {self._limits.queue}; try again in {wait} s",
                    code="queue_full",
                    retry_after=wait,
                )
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def close(self) -> None:
        """Refuses what is new, fails what waits, lets what runs end within the grace, then fails that too."""
        with self._changed:
            self._closing = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for job in waiting:
            job.put(
                Refused(503, "the server stopped before this request was begun", code="stopping")
            )
        self._thread.join(self._limits.grace_seconds)
        for job in list(self._running):
            job.cancel.set()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            self._running = jobs
            self._observe(len(jobs))
            began = time.monotonic()
            try:
                self._answer(jobs)
            finally:
                self._running = []
            self._pace = 0.7 * self._pace + 0.3 * (time.monotonic() - began)

    def _next(self) -> list[Job]:
        """Waits for rows; returns those of the next call, none when the server stops."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return []
                taken = self._take()
            if taken:
                return taken

    def _take(self) -> list[Job]:
        """Rows in order of arrival, as long as the next one fits beside them."""
        taken: list[Job] = []
        while self._waiting and len(taken) < self._limits.batch:
            job = self._waiting[0]
            late = job.deadline - time.monotonic()
            if job.cancel.is_set() or late <= 0:
                self._waiting.popleft()
                job.put(
                    Refused(504, "the deadline passed while this request waited", code="timeout")
                )
                continue
            beside = [(one.prompt, one.params) for one in taken]
            if taken and not self._service.fits_beside(beside, (job.prompt, job.params)):
                break
            self._waiting.popleft()
            job.params = replace(job.params, timeout=late)
            taken.append(job)
        return taken

    def _answer(self, jobs: list[Job]) -> None:
        try:
            self._run(jobs)
        except Exception as error:
            if len(jobs) == 1 or any(job.first is not None for job in jobs):
                for job in jobs:
                    job.put(_told(error))
                return
            for job in jobs:  # one of them is at fault, and it alone shall fail
                self._answer([job])

    def _run(self, jobs: list[Job]) -> None:
        def sink(row: int, text: str) -> None:
            if jobs[row].first is None:
                jobs[row].first = time.monotonic()
            jobs[row].put(text)

        def ended(row: int, result: GenerationResult) -> None:
            if result.finish_reason == "cancelled" and self._closing:
                jobs[row].put(
                    Refused(503, "the server stopped while this request ran", code="stopping")
                )
            jobs[row].put(result)

        self._service.batch(
            [job.prompt for job in jobs],
            [job.params for job in jobs],
            cancel=[job.cancel for job in jobs],
            sink=sink,
            ended=ended,
        )


def _told(error: Exception) -> Exception:
    known = isinstance(error, (RCError, Refused))
    return error if known else Refused(500, f"the ensemble failed: {type(error).__name__}")
