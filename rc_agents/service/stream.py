"""A running generation as an iterator of text."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

from ..errors import InputError

R = TypeVar("R")
T = TypeVar("T")


@dataclass
class _Outcome(Generic[R]):
    done: bool = False
    result: R | None = None
    error: BaseException | None = None


class TextStream(Iterator[str], Generic[R]):
    """Iterates over the text of a generation that runs in a thread of its own.

    The thread starts at once and carries the caller's context variables, so that `with model.disabled():` around the
    call holds for the whole stream (autocast, which is no context variable, does not).

    `close()`, leaving a `with` or `async with` block, or dropping the last reference ends the generation within one
    token.

    Args:
        run: generates; takes where to put text, and what tells whether the stream was closed.
    """

    def __init__(self, run: Callable[[Callable[[str], None], Callable[[], bool]], R]) -> None:
        self._queue: SimpleQueue[str | None] = SimpleQueue()  # None stands at the end
        self._closed = threading.Event()
        self._outcome: _Outcome[R] = _Outcome()
        self._ended = False
        # The thread must not keep the stream itself alive.
        queue, closed, outcome = self._queue, self._closed, self._outcome

        def work() -> None:
            try:
                outcome.result = run(queue.put, closed.is_set)
            except BaseException as error:
                outcome.error = error
            outcome.done = True
            queue.put(None)

        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(work,), name="rc_agents-stream", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> TextStream[R]:
        return self

    def __next__(self) -> str:
        text = None if self._ended or self._closed.is_set() else self._queue.get()
        if text is not None and not self._closed.is_set():
            return text
        error, first, self._ended = self._outcome.error, not self._ended, True
        if error is not None and first:
            raise error
        raise StopIteration

    @property
    def result(self) -> R:
        """The whole answer with its counts, once the stream has ended or was closed.

        Raises:
            InputError: the stream still runs; whatever the generation raised.
        """
        if not self._outcome.done:
            raise InputError("the stream has no result yet; read it to its end, or close() it")
        if self._outcome.error is not None:
            raise self._outcome.error
        assert self._outcome.result is not None
        return self._outcome.result

    def close(self) -> None:
        """Ends the generation and waits for it, at most one token long."""
        self._closed.set()
        self._thread.join()
        self._queue.put(None)  # whoever waits for text in another thread

    def __enter__(self) -> TextStream[R]:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    async def __aenter__(self) -> TextStream[R]:
        return self

    async def __aexit__(self, *error: Any) -> None:
        """As `close()`, and the event loop goes on meanwhile, also where the task is cancelled."""
        await asyncio.shield(asyncio.to_thread(self.close))

    def __del__(self) -> None:
        if closed := getattr(self, "_closed", None):
            closed.set()


async def unblocked(items: Iterator[T]) -> AsyncIterator[T]:
    """Yields what an iterator yields; each item is waited for in a thread, so that the event loop goes on.

    Args:
        items: such as a `TextStream`, or what `Conversation.pieces` makes of one.
    """
    end = object()
    while (item := await asyncio.to_thread(next, items, end)) is not end:
        yield cast(T, item)
