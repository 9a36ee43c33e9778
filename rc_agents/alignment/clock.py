"""The text as the anchor spells it, column by column: the clock that every other tokenizer follows."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from .tokens import TokenBytes, readable


@dataclass
class Clock:
    """One row of the anchor's sequence as text.

    Attributes:
        text: the bytes that other tokenizers may read so far, always valid UTF-8: an unfinished character waits, a
            broken byte reads '?'.
        sizes: for each column how long `text` was after it; a special or masked token leaves it as it was.
    """

    text: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=list)
    _raw: bytearray = field(default_factory=bytearray)
    _raw_sizes: list[int] = field(default_factory=list)
    _stops: list[int] = field(
        default_factory=list
    )  # byte at which each token with text ends, rising
    _columns: list[int] = field(default_factory=list)  # and its column
    _first: int | None = None  # column of the first token with text

    @property
    def num_columns(self) -> int:
        """Columns so far."""
        return len(self.sizes)

    def extend(self, tokens: TokenBytes, ids: Sequence[int], mask: Sequence[int]) -> None:
        """Appends columns.

        Args:
            tokens: bytes of the anchor's tokens.
            ids: the new columns' tokens.
            mask: 1 for those that are real.
        """
        for index, real in zip(ids, mask, strict=True):
            piece = tokens.pieces.get(index, b"") if real else b""
            if piece and self._first is None:
                self._first = len(self.sizes)
                if tokens.drops_first_space and piece.startswith(b" "):
                    piece = piece[1:]
            if piece:
                self._raw += piece
                self._stops.append(len(self._raw))
                self._columns.append(len(self.sizes))
                self.text += readable(bytes(self._raw[len(self.text) :])).encode()
            self.sizes.append(len(self.text))
            self._raw_sizes.append(len(self._raw))

    def column_at(self, end: int) -> int:
        """Returns the column of the last token with text that ends at or before a byte, -1 for none."""
        found = bisect_right(self._stops, end) - 1
        return self._columns[found] if found >= 0 else -1

    def cut(self, columns: int) -> None:
        """Keeps the first `columns` columns."""
        if columns >= len(self.sizes):
            return
        del self.sizes[columns:], self._raw_sizes[columns:]
        kept = bisect_left(self._columns, columns)
        del self._stops[kept:], self._columns[kept:]
        del self.text[self.sizes[-1] if columns else 0 :]
        del self._raw[self._raw_sizes[-1] if columns else 0 :]
        if self._first is not None and self._first >= columns:
            self._first = None

    def copy(self) -> Clock:
        """Returns an independent copy."""
        return Clock(
            bytearray(self.text),
            list(self.sizes),
            bytearray(self._raw),
            list(self._raw_sizes),
            list(self._stops),
            list(self._columns),
            self._first,
        )
