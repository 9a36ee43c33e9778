"""One model's own tokens of a growing text, and which of them speaks at each of the anchor's columns.

At a column the model shows the state behind the last token of its tokenization of the text up to there *alone*. Two
ways to have that token at hand (docs/alignment.md):

- `tree`: the main tokens are the tokenization of the whole text. Where the text up to a column ends in other tokens,
  those are added as a branch that sees the main tokens before it and itself.
- `line`: tokens are only ever appended; each column's new text is tokenized alone. For models that cannot branch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from .clock import Clock
from .script import Script
from .segments import Segment, Segments
from .tokens import Piece

NOTHING, AS_BEFORE = -1, -2
"""What a column reads when no token speaks there yet, or when the text has not grown."""


@dataclass
class Branch:
    """Tokens beside the main ones.

    Attributes:
        pieces: each token and the byte at which it ends.
        parents: the branch token before each, -1 where a main token is.
        roots: how many main tokens each one sees.
    """

    pieces: list[Piece] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)
    _known: dict[tuple[int, int, Piece], int] = field(default_factory=dict)

    def grow(self, root: int, tail: Sequence[Piece]) -> int:
        """Adds a branch behind `root` main tokens, sharing what is there; returns the index of its last token."""
        at = -1
        for piece in tail:
            found = self._known.get((at, root, piece))
            if found is None:
                found = self._known[at, root, piece] = len(self.pieces)
                self.pieces.append(piece)
                self.parents.append(at)
                self.roots.append(root)
            at = found
        return at

    def position(self, index: int) -> int:
        """Returns the position of a branch token in its own sequence."""
        depth, at = 0, self.parents[index]
        while at >= 0:
            depth, at = depth + 1, self.parents[at]
        return self.roots[index] + depth


@dataclass
class Row:
    """One sequence in one model's tokens.

    Attributes:
        pieces: main tokens, each with the byte of the text at which it ends.
        slots: the cache columns of the tokens that have run, rising; shorter than `pieces` while some wait to run.
        columns: the anchor's columns that are taken in.
        leads: whether the tokenizer's own leading special tokens come first; a chat template brings its own.
    """

    segments: Segments
    pieces: list[Piece] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    columns: int = 0
    leads: bool = True
    _starts: list[tuple[int, int]] = field(
        default_factory=list
    )  # byte and first token of every segment

    def __post_init__(self) -> None:
        self.pieces = self.pieces or [(index, 0) for index in self._lead]

    @property
    def _lead(self) -> list[int]:
        return self.segments.tokens.lead if self.leads else []

    def follow(self, clock: Clock, since: int, tree: bool) -> tuple[Branch, list[int]]:
        """Tokenizes what the text grew by.

        Args:
            clock: the anchor's text.
            since: the first column of this pass.
            tree: whether the model can branch.

        Returns:
            Branches, and for each column from `since` on who speaks: a main token's index, len(pieces) plus a branch
            token's, NOTHING or AS_BEFORE.
        """
        missed = clock.sizes[since - 1] > self._size(clock) if since else False
        sizes = [clock.sizes[since - 1] if since and not missed else 0, *clock.sizes[since:]]
        branch = Branch()
        speakers = (
            self._follow_tree(clock, sizes, branch)
            if tree
            else self._follow_line(clock)[since - self.columns :]
        )
        self.columns = clock.num_columns
        return branch, speakers

    def _follow_tree(self, clock: Clock, sizes: list[int], branch: Branch) -> list[int]:
        self._retokenize(clock)
        parts, segments = [], []
        for before, size in pairwise(sizes):
            if size > before:
                segments.append(bisect_left(self._starts, (size,)) - 1)
                start, _ = self._starts[segments[-1]]
                parts += [segment for _, segment in self._parts(clock, start, size)]
        alone = zip(segments, self.segments.of(parts), strict=True)
        speakers = iter([self._speaker(at, pieces, branch) for at, pieces in alone])
        return [
            next(speakers) if size > before else AS_BEFORE if size else NOTHING
            for before, size in pairwise(sizes)
        ]

    def _retokenize(self, clock: Clock) -> None:
        """Brings the main tokens up to the text; those that have run and still hold keep their slots."""
        lead = len(self._lead)
        start, index = self._starts.pop() if self._starts else (0, lead)
        parts = self._parts(clock, start, len(clock.text), cut=True)
        new: list[Piece] = []
        found = self.segments.of([segment for _, segment in parts])
        for (at, _), pieces in zip(parts, found, strict=True):
            self._starts.append((at, index + len(new)))
            new += [(token, at + end) for token, end in pieces]
        same = common_prefix(self.pieces[index : len(self.slots)], new)
        self.pieces[index:] = new
        del self.slots[index + same :]

    def _speaker(self, segment: int, alone: Sequence[Piece], branch: Branch) -> int:
        """Returns who speaks where the text ends inside a segment, given the tokens of the segment's part alone."""
        start, index = self._starts[segment]
        end = self._starts[segment + 1][1] if segment + 1 < len(self._starts) else len(self.pieces)
        tail = [(token, start + stop) for token, stop in alone]
        same = common_prefix(self.pieces[index:end], tail)
        if same < len(tail):
            return len(self.pieces) + branch.grow(index + same, tail[same:])
        return index + same - 1 if index + same > len(self._lead) else NOTHING

    def _follow_line(self, clock: Clock) -> list[int]:
        """Appends the text of every column not yet taken in; returns who speaks there."""
        sizes = [self._size(clock), *clock.sizes[self.columns :]]
        columns = [self._parts(clock, before, size) for before, size in pairwise(sizes)]
        found = iter(self.segments.of([segment for parts in columns for _, segment in parts]))
        speakers, last = [], AS_BEFORE if sizes[0] else NOTHING
        for parts in columns:
            new = [(token, at + end) for at, _ in parts for token, end in next(found)]
            self.pieces += new
            last = len(self.pieces) - 1 if new else last
            speakers.append(last)
        return speakers

    def _parts(
        self, clock: Clock, start: int, stop: int, *, cut: bool = False
    ) -> list[tuple[int, Segment]]:
        """Returns the text between two bytes as what is tokenized alone, each part with the byte at which it starts.

        Args:
            cut: whether to cut it into segments; special tokens lie apart in any case.
        """
        found = []
        for a, b, token in clock.parts(start, stop):
            text = bytes(clock.text[a:b])
            begins = a == 0 or (clock.is_behind_mark(a) and self.segments.tokens.begins_anew)
            inner = self.segments.starts(text) if cut and token is None else [0]
            found += [
                (a + x, Segment(text[x:y], begins and x == 0, token))
                for x, y in pairwise([*inner, len(text)])
            ]
        return found

    def _size(self, clock: Clock) -> int:
        """Bytes of the text that are taken in."""
        return clock.sizes[self.columns - 1] if self.columns else 0

    def cut(self, columns: int, size: int) -> None:
        """Forgets what was read beyond a column, and the text beyond `size` bytes."""
        self.columns = min(self.columns, columns)
        while self._starts and self._starts[-1][0] >= size:
            self._starts.pop()
        lead = len(self._lead)
        kept = (
            bisect_right(self.pieces, size, lo=lead, key=lambda piece: piece[1]) if size else lead
        )
        del self.pieces[kept:], self.slots[kept:]

    def copy(self) -> Row:
        """Returns an independent copy."""
        copied = replace(self, pieces=list(self.pieces), slots=list(self.slots))
        copied._starts = list(self._starts)
        return copied


def common_prefix(one: Sequence[Piece], other: Sequence[Piece]) -> int:
    """Returns how many leading entries two sequences share."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


@dataclass
class SpanText:
    """One model's running tokenization of every row of a batch.

    Attributes:
        tree: whether the model can branch.
        clocks: the text that each row reads.
        num_slots: columns of its cache that are written, branches and padding included.
    """

    tree: bool
    rows: list[Row]
    clocks: list[Clock]
    num_slots: int = 0

    def copy(self) -> SpanText:
        """Returns one that goes its own way from here."""
        rows, clocks = [row.copy() for row in self.rows], [clock.copy() for clock in self.clocks]
        return SpanText(self.tree, rows, clocks, self.num_slots)

    def live_slots(self) -> int:
        """Returns the number of leading slots in use by any row; those after it hold nothing any more."""
        return max((row.slots[-1] + 1 for row in self.rows if row.slots), default=0)

    def cut(self, columns: int) -> None:
        """Follows the anchor back to its first `columns` columns."""
        for row, clock in zip(self.rows, self.clocks, strict=True):
            clock.cut(columns)
            row.cut(columns, len(clock.text))

    def select(self, indices: Sequence[int]) -> None:
        """Reorders or repeats the rows, as beam search does."""
        self.rows = [self.rows[index].copy() for index in indices]
        self.clocks = [self.clocks[index].copy() for index in indices]

    def shift(self, columns: int) -> None:
        """Follows the anchor, whose columns move to the right, or to the left onto masked ones."""
        for b, (row, clock) in enumerate(zip(self.rows, self.clocks, strict=True)):
            if clock.num_columns <= max(0, -columns):  # masked ones alone
                self.begin(b, clock.script)
            else:
                clock.shift(columns)
                row.columns = max(0, row.columns + columns) if row.columns else 0

    def begin(self, index: int, script: Script | None) -> None:
        """Lets a row begin anew."""
        self.rows[index] = Row(self.rows[index].segments, leads=script is None)
        self.clocks[index] = Clock(script)
