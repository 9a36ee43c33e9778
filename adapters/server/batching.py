"""One thread that answers what waits, several rows side by side.

Rows that wait join those that run at any token, where the models' caches allow it; otherwise, as many as fit side by
side, when the last of these has ended. Those who ask take turns, each one's rows in order of arrival. A row whose
client has gone ends within one token.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rc_agents import RCError
from rc_agents.service import GenerationResult, GenerationService, Request

from .errors import LOG, Refused, log
from .jobs import Job
from .limits import Limits
from .turns import Turns


class Batcher:
    """Answers jobs.

    Args:
        service: of the ensemble.
        limits: rows side by side, rows that wait, seconds to end.
        observe: told how many rows run whenever some begin.

    Attributes:
        refusal: why rows wait until those that run have ended; None where they join at any token.
    """

    def __init__(
        self, service: GenerationService, limits: Limits, observe: Callable[[int], None]
    ) -> None:
        self._service, self._limits, self._observe = service, limits, observe
        self.refusal = (
            service.joining_refusal() if limits.continuous else "continuous batching is off"
        )
        self._waiting: deque[Job] = deque()
        self._turns = Turns()
        self._running: list[Job] = []
        self._held: Counter[str] = Counter()  # rows of requests that are being read, by who asks
        self._changed = threading.Condition()
        self._closing = False
        self._pace = 1.0  # seconds that a row has taken lately, from its first token's call on
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return sum(not one.cancel.is_set() for one in list(self._waiting))

    @property
    def running(self) -> int:
        """Rows that are being answered and that somebody still wants."""
        return sum(not (one.cancel.is_set() or one.ended or one.answered) for one in self._running)

    @property
    def alive(self) -> bool:
        """Whether rows that come are answered."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    def start(self) -> None:
        """Begins to answer; again after a `close`."""
        self._closing = False
        why = "at any token" if self.refusal is None else f"by call: {self.refusal}"
        LOG.info("answers join others %s", why)
        for name, reason in self._service.blind().items():
            LOG.warning("nothing can be shown to %s: %s", name, reason)
        self._thread = threading.Thread(target=self._work, name="rc_agents-batcher", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts a request's rows into the queue, all or none.

        An eighth of the queue is kept for others than whoever has filled the rest.

        Raises:
            Refused: the queue is full (429, with the time after which to try again), or the server stops (503).
        """
        with self._changed:
            self._check({job.asker for job in jobs}, len(jobs))
            for job in jobs:
                job.turn = self._turns.give(
                    job.asker, ((one.asker, one.turn) for one in self._waiting)
                )
                self._waiting.append(job)
            self._waiting = deque(sorted(self._waiting, key=lambda one: one.turn))
            self._changed.notify_all()

    @contextmanager
    def place(self, asker: str, rows: int) -> Iterator[None]:
        """Holds room in the queue while a request is read that takes work, as one with pictures does.

        Raises:
            Refused: as for `submit`.
        """
        with self._changed:
            self._check({asker}, rows)
            self._held[asker] += rows
        try:
            yield
        finally:
            with self._changed:
                self._held[asker] -= rows
                self._held += Counter()  # without those at 0

    def _check(self, askers: set[str], rows: int) -> None:
        if not self.alive:
            raise Refused(503, "the server is stopping", code="stopping")
        self._waiting = deque(one for one in self._waiting if not one.cancel.is_set())
        waiting, most = len(self._waiting) + self._held.total(), self._limits.queue
        own = sum(one.asker in askers for one in self._waiting)
        own += sum(self._held[one] for one in askers)
        if waiting + rows > most or own + rows > most - most // 8:
            wait = max(1, round(self._pace * (1 + waiting / self._limits.batch)))
            raise Refused(
                429,
                f"{waiting} answers wait, {own} of them yours, and the queue holds {most}, {most - most // 8} of "
                f"them for one who asks; try again in {wait} s",
                code="queue_full",
                retry_after=wait,
            )

    def stop(self) -> None:
        """Refuses what is new and what waits; what runs has the grace to end. Returns at once."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for job in waiting:
            said = "the server stopped before this request was begun"
            job.put(Refused(503, said, code="stopping"))
        late = threading.Timer(self._limits.grace_seconds, self._cut)
        late.daemon = True
        late.start()

    def close(self) -> None:
        """Stops, and waits until nothing runs."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _cut(self) -> None:
        for job in list(self._running):
            job.cancel.set()

    def _work(self) -> None:
        while jobs := self._next():
            self._running = jobs
            self._observe(len(jobs))
            try:
                self._answer(jobs)
            except Exception as error:  # the thread goes on, whatever happens to a call
                for job in self._running:
                    if not job.answered:
                        job.put(_told(error))
            finally:
                self._running = []

    def _next(self) -> list[Job]:
        """Waits for rows; returns those of the next call, none when the server stops."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return []
                taken = self._take(self._limits.batch)
            if taken:
                return taken

    def _take(self, most: int) -> list[Job]:
        """Rows in order of their turns, as long as the next one fits beside them."""
        taken: list[Job] = []
        joining = self.refusal is None
        running = [one for one in self._running if not one.answered] if joining else []
        while self._waiting and len(taken) < most:
            job = self._waiting[0]
            if not job.cancel.is_set():
                try:
                    beside = [(one.prompt, one.params) for one in [*running, *taken]]
                    own = (job.prompt, job.params)
                    fits = self._service.fits_beside(beside, own, continuous=joining)
                    if beside and not fits:
                        break
                except Exception as error:  # it fitted when it came
                    job.put(_told(error))
                    self._waiting.popleft()
                    continue
                job.begun = time.monotonic()
                self._turns.begin(job.turn)
                taken.append(job)
            self._waiting.popleft()
        return taken

    def _answer(self, jobs: list[Job]) -> None:
        """Answers rows, in continuous batching also those that join them."""
        if self.refusal is None:
            self._service.continuous(partial(self._joining, list(jobs)))
            return
        try:
            self._run(jobs)
        except Exception as error:
            left = [job for job in jobs if not job.answered]
            for job in left:
                if len(left) == 1 or job.first is not None:
                    job.put(_told(error) if len(left) == 1 else _told(RuntimeError("batch")))
                else:  # the one at fault shall fail alone
                    self._answer([job])

    def _joining(self, first: list[Job], running: int) -> list[Request]:
        """Returns the rows to begin with, and later those that wait and have a place."""
        if not first and (not self._waiting or running >= self._limits.batch):
            return []
        new, first[:] = list(first), []
        if not new:
            with self._changed:
                new = [] if self._closing else self._take(self._limits.batch - running)
            self._running = [one for one in self._running if not one.answered] + new
            if new:
                self._observe(running + len(new))
        return [
            Request(
                prompt=job.prompt,
                params=job.timed(),
                cancel=job.cancel,
                begun=partial(self._read, job),
                sink=job.text,
                ended=partial(self._ended, job),
            )
            for job in new
        ]

    def _run(self, jobs: list[Job]) -> None:
        """Answers rows in one call."""
        for job in jobs:
            self._read(job)
        self._service.batch(
            [job.prompt for job in jobs],
            [job.timed() for job in jobs],
            cancel=[job.cancel for job in jobs],
            sink=lambda row, text: jobs[row].text(text),
            ended=lambda row, result: self._ended(jobs[row], result),
        )

    def _read(self, job: Job) -> None:
        """Scores a row's prompt where that was asked for."""
        if job.reads and not job.read and not job.cancel.is_set():
            job.read = self._service.score(job.prompt, job.params)

    def _ended(self, job: Job, result: GenerationResult) -> None:
        job.answered = True
        if result.finish_reason == "cancelled" and self._closing:
            job.put(Refused(503, "the server stopped while this request ran", code="stopping"))
        job.put(result if result.error is None else _told(result.error))
        self._pace = 0.9 * self._pace + 0.1 * (time.monotonic() - (job.begun or 0.0))


def _told(error: Exception) -> Exception:
    """What a client hears of an error; others are logged, without their words, which may quote a prompt."""
    if isinstance(error, (RCError, Refused)):
        return error
    log(error)
    return Refused(500, f"the ensemble failed: {type(error).__name__}")
