"""The text as the anchor spells it, column by column: the clock that every other tokenizer follows."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..errors import InputError
from .script import Script
from .tokens import TokenBytes, readable


@dataclass
class Clock:
    """One row of the anchor's sequence as text.

    Attributes:
        script: what another model reads in place of the conversation that the sequence begins with.
        text: the bytes that other tokenizers may read so far, always valid UTF-8: an unfinished character waits, a
            broken byte reads '?'.
        sizes: for each column how long `text` was after it; a special or masked token leaves it as it was.
    """

    script: Script | None = None
    text: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=list)
    _raw: bytearray = field(default_factory=bytearray)
    _raw_sizes: list[int] = field(default_factory=list)
    _stops: list[int] = field(
        default_factory=list
    )  # byte at which each token with text ends, rising
    _columns: list[int] = field(default_factory=list)  # and its column
    _first: int | None = (
        None  # column of the first token with text, of the answer's where there is a script
    )
    _taken: list[int] = field(default_factory=list)  # the script's tokens so far, by column

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
            taken = self._taken[-1] if self._taken else 0
            if real and self.script is not None and taken < len(self.script.sizes):
                self._follow(self.script, taken, index)
                taken += 1
            elif real:
                self._append(tokens, tokens.pieces.get(index, b""))
            self._taken.append(taken)
            self.sizes.append(len(self.text))
            self._raw_sizes.append(len(self._raw))

    def _follow(self, script: Script, taken: int, index: int) -> None:
        if script.token_ids[taken] != index:
            raise InputError(
                f"token {taken} of a conversation is {index}, but its chat was made for {script.token_ids[taken]}; "
                "pass all that model.chat_inputs returned"
            )
        size = script.sizes[taken]
        if size > len(self.text):
            self._grow(script.text[len(self.text) : size])

    def _append(self, tokens: TokenBytes, piece: bytes) -> None:
        if piece and self._first is None:
            self._first = len(self.sizes)
            if tokens.drops_first_space and piece.startswith(b" "):
                piece = piece[1:]
        if piece and self.script is not None:
            piece = self.script.text[len(self._raw) :] + piece  # what no column has shown
        if piece:
            self._grow(piece)

    def _grow(self, piece: bytes) -> None:
        self._raw += piece
        self._stops.append(len(self._raw))
        self._columns.append(len(self.sizes))
        self.text += readable(bytes(self._raw[len(self.text) :])).encode()

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        """Yields the stretches of text between two bytes, each with the special token that it spells, if any."""
        marks = () if self.script is None else self.script.marks
        for mark in marks[bisect_left(marks, (start,)) :]:
            if mark.start >= stop:
                break
            if mark.start > start:
                yield start, mark.start, None
            yield mark
            start = mark.stop
        if start < stop:
            yield start, stop, None

    def is_behind_mark(self, byte: int) -> bool:
        """Whether a special token ends at a byte."""
        marks = () if self.script is None else self.script.marks
        found = bisect_left(marks, (byte,))
        return found > 0 and marks[found - 1].stop == byte

    def column_at(self, end: int) -> int:
        """Returns the column of the last token with text that ends at or before a byte, -1 for none."""
        found = bisect_right(self._stops, end) - 1
        return self._columns[found] if found >= 0 else -1

    def cut(self, columns: int) -> None:
        """Keeps the first `columns` columns."""
        if columns >= len(self.sizes):
            return
        del self.sizes[columns:], self._raw_sizes[columns:], self._taken[columns:]
        kept = bisect_left(self._columns, columns)
        del self._stops[kept:], self._columns[kept:]
        del self.text[self.sizes[-1] if columns else 0 :]
        del self._raw[self._raw_sizes[-1] if columns else 0 :]
        if self._first is not None and self._first >= columns:
            self._first = None

    def shift(self, columns: int) -> None:
        """Moves all columns to the right, behind masked ones; to the left, where the first ones were masked."""
        for sizes in (self.sizes, self._raw_sizes, self._taken):
            sizes[: max(0, -columns)] = [0] * max(0, columns)
        self._columns = [column + columns for column in self._columns]
        if self._first is not None:
            self._first += columns

    def goes_on(self, earlier: Clock) -> bool:
        """Whether this reads the columns of an earlier clock as that one did."""
        columns, size = earlier.num_columns, len(earlier.text)
        same = self.sizes[:columns] == earlier.sizes and self.text[:size] == earlier.text
        return same and list(self.parts(0, size)) == list(earlier.parts(0, size))

    def copy(self) -> Clock:
        """Returns an independent copy."""
        return replace(
            self,
            text=bytearray(self.text),
            sizes=list(self.sizes),
            _raw=bytearray(self._raw),
            _raw_sizes=list(self._raw_sizes),
            _stops=list(self._stops),
            _columns=list(self._columns),
            _taken=list(self._taken),
        )
