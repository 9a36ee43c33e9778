"""Several tokenizations of one growing text: which source token a target token may read.

A target token that ends at byte e reads the last source token that ends at or before e and that belongs to the common
prefix of two source tokenizations: of the whole text, and of text[:e] alone. Tokens are looked up by *slot*, the
column under which a model's states are kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from .tokens import TokenBytes, readable


@dataclass
class Row:
    """One sequence in one model's tokens.

    Args:
        ids: token ids.
        ends: byte of the text at which each token ends.
        slots: column of each token in the model's cache and state history.
    """

    ids: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def cut(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        del self.ids[length:], self.ends[length:], self.slots[length:]

    def copy(self) -> Row:
        """Returns an independent copy."""
        return Row(list(self.ids), list(self.ends), list(self.slots))


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many leading entries two sequences share."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def stable_limits(data: bytes, ends: Sequence[int], source: TokenBytes) -> dict[int, int]:
    """Returns for each byte e of `ends` up to which byte the source's tokens are settled by text[:e] alone.

    That is the end of the common prefix of the source's tokenizations of the whole text and of text[:e]: beyond it,
    bytes after e chose the tokens.
    """
    whole = readable(data)
    wanted = sorted(set(ends))
    prefixes = [readable(data[:end]) for end in wanted]
    full, *parts = source.encode([whole, *prefixes])
    limits = {}
    for end, (ids, _) in zip(wanted, parts, strict=True):
        shared = common_prefix(full[0], ids)
        limits[end] = full[1][shared - 1] if shared else 0
    return limits


def read_index(target_ends: Sequence[int], source: Row, limits: dict[int, int]) -> list[int]:
    """Returns for every target token the source's slot it reads, -1 for none.

    Args:
        target_ends: byte at which each target token ends.
        source: the source's tokens of the same text.
        limits: `stable_limits` for those bytes.
    """
    textual, stops, last = [], [], 0
    for slot, end in zip(source.slots, source.ends, strict=True):
        if end > last:  # a special token stands for no text and is not read
            textual.append(slot)
            stops.append(end)
            last = end
    found = [bisect_right(stops, min(end, limits[end])) - 1 for end in target_ends]
    return [textual[k] if k >= 0 else -1 for k in found]


@dataclass
class SpanText:
    """One model's running tokenization of every row of a batch."""

    tokens: TokenBytes
    rows: list[Row] = field(default_factory=list)
    num_slots: int = 0

    def follow(self, texts: Sequence[str]) -> list[int]:
        """Re-tokenizes grown (or cut) texts, keeping the common prefix of each row.

        Args:
            texts: the whole text of every row.

        Returns:
            For each row how many of its tokens stay; the rest of `rows[b].ids` is new and has no slot yet.
        """
        if not self.rows:
            self.rows = [Row() for _ in texts]
        kept = []
        for row, (ids, ends) in zip(self.rows, self.tokens.encode(texts), strict=True):
            keep = common_prefix(row.ids[: len(row.slots)], ids)
            row.cut(keep)
            row.ids, row.ends = ids, ends
            kept.append(keep)
        return kept

    def live_slots(self) -> int:
        """Returns the number of leading slots in use by any row; those after it hold nothing any more."""
        return max((max(row.slots, default=-1) for row in self.rows), default=-1) + 1

    def select(self, indices: Sequence[int]) -> None:
        """Reorders or repeats the rows, as beam search does."""
        self.rows = [self.rows[index].copy() for index in indices]
