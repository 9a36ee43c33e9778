"""Rows on their way: what each carries from token to token, and who is asked and told about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from ..execution import LOST
from .guides import Guiding
from .reading import RowReader
from .rows import Row
from .trace import TokenRecord, Trace


class Answer(NamedTuple):
    """A row that has ended, with what was kept of its tokens, and what went wrong with it alone."""

    reader: RowReader
    records: tuple[TokenRecord, ...]
    error: Exception | None = None
    lost: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Who is asked and told about a row while it runs.

    Args:
        stopped: asked before a call and at each step; True ends the row.
        begun: told between two calls, before its prompt is read.
        sink: takes its text as it settles.
        ended: takes its answer as soon as it has ended, while others may go on.
    """

    stopped: Callable[[], bool]
    begun: Callable[[], None] = lambda: None
    sink: Callable[[str], None] | None = None
    ended: Callable[[Answer], None] | None = None


@dataclass(eq=False, kw_only=True)
class Going:
    """A row on its way.

    Attributes:
        row: what was asked.
        calls: who is asked and told about it.
        reader: of its new tokens.
        tokens: of its prompt and of its answer so far.
        deadline: of `time.monotonic`, None for none.
        guiding: what keeps it to its form, None where it is free.
        trace: what is kept of its tokens, None for nothing.
        error: what went wrong with it alone.
    """

    row: Row
    calls: Calls
    reader: RowReader
    tokens: list[int]
    deadline: float | None = None
    guiding: Guiding | None = None
    trace: Trace | None = None
    error: Exception | None = None

    @property
    def ended(self) -> bool:
        """Whether it gets no more tokens."""
        return self.reader.finish_reason is not None

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.row.limit - self.reader.count

    def fail(self, error: Exception) -> None:
        """Ends it for what went wrong with it alone, and says so."""
        self.error = error
        self.reader.finish("error")
        self.tell()

    def tell(self) -> None:
        """Tells what has become of it."""
        if self.calls.ended is not None:
            self.calls.ended(self.answer())

    def answer(self) -> Answer:
        """Returns what has become of it."""
        kept = () if self.trace is None else tuple(self.trace.records)
        return Answer(self.reader, kept, self.error, LOST.get())
