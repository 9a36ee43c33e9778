"""Lays the tokens of models with different tokenizers side by side for one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..alignment import AS_BEFORE, NOTHING, Branch, Segments, SpanText, TokenBytes
from ..cache import CoupledCache
from .texts import Chats, wind
from .tree import Mask, Sight, takes_branches

HOLE = 1 << 30  # stands for a slot that holds no main token


@dataclass
class Reader:
    """A model that reads the text in its own tokens.

    Attributes:
        tree: whether it can run branch tokens; else its tokens are only ever appended.
    """

    model: PreTrainedModel
    segments: Segments
    tree: bool

    @classmethod
    def of(
        cls, name: str, model: PreTrainedModel, tokenizer: Any, tree: bool | None = None
    ) -> Reader:
        """Makes the reader of one model; raises `TokenError` where its tokenizer is of an unknown kind."""
        tree = takes_branches(model) if tree is None else tree
        return cls(model, Segments(TokenBytes(tokenizer, name)), tree)


@dataclass
class Step:
    """What one model with its own tokenizer runs in this pass: S tokens, the main ones first, then branches.

    Attributes:
        input_ids: (B, S).
        position_ids: (B, S).
        attention_mask: what `Sight.mask` gives, (B, K), or None where every token sees all before it.
        real: 1 for the main tokens, 0 for padding, (B, number of main tokens).
        cached: whether it goes on from its cache; else it runs the whole text.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Mask | None
    real: Tensor
    cached: bool = True


@dataclass
class SpanPlan:
    """A pass's inputs for the models with their own tokenizers, and who reads whom.

    Attributes:
        steps: name -> its new tokens; a model without new tokens is left out.
        picks: name -> which of its states it shows at each new column of the anchor, (B, T): an index into what it
            showed at the P columns before, then its S states of this pass; -1 for nothing.
        reads: name -> the column that each of its S tokens reads, (B, S), -1 for none.
    """

    steps: dict[str, Step] = field(default_factory=dict)
    picks: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, Tensor] = field(default_factory=dict)

    def goes_on(self, name: str) -> bool:
        """Whether a model goes on from its cache in this pass."""
        return name not in self.steps or self.steps[name].cached


def plan(
    memory: CoupledCache,
    readers: Mapping[str, Reader],
    anchor: TokenBytes,
    input_ids: Tensor,
    attention_mask: Tensor,
    chats: Chats | None = None,
    present: Mapping[str, Tensor] | None = None,
) -> SpanPlan:
    """Tokenizes the text's new part for every reader, and aligns them by bytes.

    Args:
        memory: running tokenizations and caches; changed in place.
        readers: the models that read in their own tokens, by name.
        anchor: bytes of the anchor's tokens.
        input_ids: the anchor's whole sequence so far, (B, P + T).
        attention_mask: 1 for its real tokens, (B, P + T).
        chats: how models with their own templates read each row, (B,).
        present: name -> whether it takes part in each row, (B,); one that can branch reads no others. None for all.

    Raises:
        InputError: a chat that does not belong to these tokens or to what the cache holds.
    """
    since, result = memory.length, SpanPlan()
    for name, reader in readers.items():
        text = wind(
            memory, name, reader.segments, reader.tree, anchor, input_ids, attention_mask, chats
        )
        asked = [True] * len(text.rows)
        if present is not None and text.tree:
            asked = present[name].tolist()
        followed = [
            row.follow(clock, since, text.tree)
            if wanted
            else (Branch(), [NOTHING] * (clock.num_columns - since))
            for row, clock, wanted in zip(text.rows, text.clocks, asked, strict=True)
        ]
        branches, speakers = [branch for branch, _ in followed], [who for _, who in followed]
        cached = _roll_back(memory, name, reader, len(text.rows))
        kept = [len(row.slots) for row in text.rows]
        step = _step(text, branches, reader, cached)
        if step is not None:
            result.steps[name] = step
            result.reads[name] = _reads(text, branches, kept, step)
        width = 0 if step is None else step.real.shape[1]
        places = [
            _places(who, since, begun, len(row.pieces), width)
            for who, row, begun in zip(speakers, text.rows, kept, strict=True)
        ]
        result.picks[name] = torch.tensor(places, dtype=torch.long)
    return result


def _roll_back(memory: CoupledCache, name: str, reader: Reader, num_rows: int) -> bool:
    """Takes off the cache what no longer holds; returns whether the model can go on from it.

    A model that cannot branch cannot skip a cache column either: rows that differ in length run from the start.
    """
    text, cache = memory.texts[name], memory.caches.get(name)
    surplus = text.num_slots - text.live_slots()
    cached = cache is not None and (text.tree or num_rows == 1)
    if cached and not text.num_slots and not text.tree:
        memory.renew(name, reader.model.config)
        cache = memory.caches[name]
    if cached and surplus and text.tree:
        cache.crop(-surplus)
    elif not cached or surplus:
        for row in text.rows:
            row.slots = []
        if cached:
            memory.renew(name, reader.model.config)
    text.num_slots = text.live_slots()
    return cached


def _step(text: SpanText, branches: list[Branch], reader: Reader, cached: bool) -> Step | None:
    begun = [len(row.slots) for row in text.rows]
    main = [
        [token for token, _ in row.pieces[at:]] for row, at in zip(text.rows, begun, strict=True)
    ]
    aside = [[token for token, _ in branch.pieces] for branch in branches]
    width, extra = max(map(len, main)), max(map(len, aside))
    if not width + extra:
        return None
    base = text.num_slots
    for row, ids in zip(text.rows, main, strict=True):
        row.slots += range(base, base + len(ids))
    text.num_slots += width + extra
    input_ids = torch.cat([_padded(main, width), _padded(aside, extra)], 1)
    places = [list(range(at, at + len(ids))) for at, ids in zip(begun, main, strict=True)]
    beside = [[branch.position(k) for k in range(len(branch.pieces))] for branch in branches]
    position_ids = torch.cat([_padded(places, width), _padded(beside, extra)], 1)
    real = _padded([[1] * len(ids) for ids in main], width)
    mask: Mask | None = None
    if text.tree and any(len(row.slots) < text.num_slots for row in text.rows):
        mask = _sight(text, branches, begun, position_ids, width).mask(reader.model)
    elif not text.tree:
        mask = real if base == 0 else torch.ones(1, text.num_slots, dtype=torch.long)
    return Step(input_ids, position_ids, mask, real, cached)


def _sight(
    text: SpanText, branches: list[Branch], begun: list[int], positions: Tensor, width: int
) -> Sight:
    """A main token sees the main tokens up to itself; a branch token those before its root, its branch, itself."""
    num_rows, num_new = positions.shape
    base = text.num_slots - num_new
    order = torch.full((num_rows, text.num_slots), HOLE)  # (B, K) which main token lies in a slot
    limit = torch.full((num_rows, num_new), -1)  # (B, S) the last main token that a token sees
    beside = torch.zeros(num_rows, num_new, text.num_slots, dtype=torch.bool)  # (B, S, K)
    beside[:, range(num_new), range(base, text.num_slots)] = True
    for b, (row, branch, at) in enumerate(zip(text.rows, branches, begun, strict=True)):
        order[b, row.slots] = torch.arange(len(row.slots))
        limit[b, : len(row.slots) - at] = torch.arange(at, len(row.slots))
        limit[b, width : width + len(branch.roots)] = (
            torch.tensor(branch.roots, dtype=torch.long) - 1
        )
        for k, parent in enumerate(branch.parents):
            if parent >= 0:
                beside[b, width + k, base:] |= beside[b, width + parent, base:]
    where = torch.cat([order[:, :base], positions], 1)  # (B, K)
    return Sight((order[:, None] <= limit[:, :, None]) | beside, positions, where)


def _reads(text: SpanText, branches: Sequence[Branch], kept: Sequence[int], step: Step) -> Tensor:
    width, total = step.real.shape[1], step.input_ids.shape[1]
    reads = torch.full((len(text.rows), total), -1)
    each = zip(text.rows, branches, text.clocks, kept, strict=True)
    for b, (row, branch, clock, at) in enumerate(each):
        for start, pieces in ((0, row.pieces[at:]), (width, branch.pieces)):
            columns = [clock.column_at(end) for _, end in pieces]
            reads[b, start : start + len(pieces)] = torch.tensor(columns, dtype=torch.long)
    return reads


def _places(
    speakers: Sequence[int], since: int, begun: int, num_main: int, width: int
) -> list[int]:
    """Where to find each speaker's state: among the P columns before, then this pass's tokens."""
    places, last = [], since - 1
    for who in speakers:
        if who == NOTHING:
            last = -1
        elif who >= num_main:
            last = since + width + who - num_main
        elif who != AS_BEFORE and who >= begun:
            last = since + who - begun
        places.append(last)
    return places


def _padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows], dtype=torch.long)
