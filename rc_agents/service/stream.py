"""A running generation as an iterator of text."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from ..errors import InputError

R = TypeVar("R")


@dataclass
class _End(Generic[R]):
    result: R | None = None
    error: BaseException | None = None


class TextStream(Iterator[str], Generic[R]):
    """Iterates over the text of a generation that runs in a thread of its own.

    The thread starts at once and carries the caller's context variables, so that `with model.disabled():` around the
    call holds for the whole stream (autocast, which is no context variable, does not).

    `close()`, leaving a `with` block, or dropping the last reference ends the generation within one token.

    Args:
        run: generates; takes where to put text, and what tells whether the stream was closed.
    """

    def __init__(self, run: Callable[[Callable[[str], None], Callable[[], bool]], R]) -> None:
        self._queue: SimpleQueue[str | _End[R]] = SimpleQueue()
        self._closed = threading.Event()
        self._end: _End[R] | None = None
        queue, closed = (
            self._queue,
            self._closed,
        )  # the thread must not keep the stream itself alive

        def work() -> None:
            try:
                queue.put(_End(result=run(queue.put, closed.is_set)))
            except BaseException as error:
                queue.put(_End(error=error))

        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(work,), name="rc_agents-stream", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> TextStream[R]:
        return self

    def __next__(self) -> str:
        if self._end is not None or self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, str):
            return item
        self._end = item
        if item.error is not None:
            raise item.error
        raise StopIteration

    @property
    def result(self) -> R:
        """The whole answer with its counts, once the stream has ended or was closed.

        Raises:
            InputError: the stream still runs; whatever the generation raised.
        """
        if self._end is None:
            raise InputError("the stream has no result yet; read it to its end, or close() it")
        if self._end.error is not None:
            raise self._end.error
        assert self._end.result is not None
        return self._end.result

    def close(self) -> None:
        """Ends the generation and waits for it, at most one token long."""
        self._closed.set()
        self._thread.join()
        while self._end is None:
            item = self._queue.get()
            self._end = item if isinstance(item, _End) else None

    def __enter__(self) -> TextStream[R]:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if closed := getattr(self, "_closed", None):
            closed.set()
