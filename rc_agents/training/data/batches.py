"""Batches that waste no padding: equal blocks of text, and pairs packed behind their shared prefix.

Shapes: B rows, T tokens of a row, P positions with a label.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rc_agents.errors import DataError
from rc_agents.training.data.encoding import TEXT_GROUP, Encoded

Batch = dict[str, Tensor]
POOL_BATCHES = 32  # batches among which examples are sorted by length


def plan(
    examples: Sequence[Encoded],
    *,
    batch_size: int,
    text_batch_size: int,
    steps: int,
    seed: int,
    mix: Mapping[str, float] | None = None,
    by_length: bool = False,
) -> list[list[int]]:
    """Returns which examples each step sees.

    A batch is of one group, and each group runs through its own shuffled epochs.

    Args:
        examples: what there is to learn.
        batch_size: pairs a step.
        text_batch_size: text blocks a step.
        steps: length of the plan.
        seed: of the order.
        mix: share of the steps by group; by default that of its batches in one epoch of everything.
        by_length: put examples of like length into one batch, so that padding is small.

    Raises:
        DataError: `mix` names other groups than the data has.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.group].append(index)
    sizes = {name: text_batch_size if name == TEXT_GROUP else batch_size for name in groups}
    shares = mix or {
        name: math.ceil(len(members) / sizes[name]) for name, members in groups.items()
    }
    if set(shares) != set(groups):
        raise DataError(f"mix names the groups {sorted(shares)}, but the data has {sorted(groups)}")
    rng = random.Random(seed)
    lengths = [len(example.ids) for example in examples] if by_length else None
    streams = {
        name: _stream(members, sizes[name], rng, lengths)
        for name, members in sorted(groups.items())
    }
    chosen = rng.choices(sorted(shares), [shares[name] for name in sorted(shares)], k=steps)
    return [next(streams[name]) for name in chosen]


def _stream(
    members: Sequence[int], size: int, rng: random.Random, lengths: Sequence[int] | None
) -> Iterator[list[int]]:
    """Yields batches without end, epoch after epoch; a rest too short for a batch is left out."""
    while True:
        order = rng.sample(members, len(members))
        if lengths is not None:
            order = _by_length(order[: max(len(order) // size, 1) * size], size, rng, lengths)
        for start in range(0, max(len(order) - size, 0) + 1, size):
            yield order[start : start + size]


def _by_length(
    order: Sequence[int], size: int, rng: random.Random, lengths: Sequence[int]
) -> list[int]:
    """Returns shuffled examples sorted by length within pools of some batches, the batches shuffled again.

    So a batch holds like lengths, and still other examples in every epoch.
    """
    pool = POOL_BATCHES * size
    batches = [
        ranked[start : start + size]
        for first in range(0, len(order), pool)
        for ranked in [sorted(order[first : first + pool], key=lengths.__getitem__)]
        for start in range(0, len(ranked), size)
    ]
    return [index for batch in rng.sample(batches, len(batches)) for index in batch]


class Batches(torch.utils.data.Dataset[Batch]):
    """The batches of a plan in order, one a step, collated when asked for."""

    def __init__(
        self, examples: Sequence[Encoded], steps: Sequence[Sequence[int]], *, packed: bool = True
    ) -> None:
        self.examples, self.steps, self.packed = examples, steps, packed

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> Batch:
        return collate([self.examples[index] for index in self.steps[step]], packed=self.packed)


def collate(examples: Sequence[Encoded], *, packed: bool = True) -> Batch:
    """Returns one batch: text blocks as equal rows, pairs in a single one, or padded if not `packed`."""
    if all(example.group == TEXT_GROUP for example in examples):
        ids_BT = torch.tensor([example.ids for example in examples])
        return {"input_ids": ids_BT, "labels": ids_BT.clone()}
    return pack(examples) if packed else pad(examples)


def pad(examples: Sequence[Encoded]) -> Batch:
    """Returns pairs as rows (B, T) padded on the right, with -100 for every label before the answer."""
    rows = [torch.tensor(example.ids) for example in examples]
    labels = [row.clone() for row in rows]
    for label, example in zip(labels, examples, strict=True):
        label[: example.answer_start] = -100
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def pack(examples: Sequence[Encoded]) -> Batch:
    """Returns pairs one after another in a single row: their common prefix once, each blind to the rest.

    Every labelled position gets the logits it has when its pair runs alone, at a fraction of the
    tokens: there is no padding, and what a prompt template starts with is computed once a batch.

    Returns:
        `input_ids` and `position_ids` (1, T), `attention_mask` (1, 1, T, T) to be added, and for the P
        positions with a label `label_positions` (P) and `targets` (P), the token that comes next.
    """
    shared = _shared_prefix(examples)
    ids, positions, owners = list(examples[0].ids[:shared]), list(range(shared)), [-1] * shared
    label_positions, targets = [], []
    for owner, example in enumerate(examples):
        offset = len(ids) - shared
        ids += example.ids[shared:-1]
        positions += range(shared, len(example.ids) - 1)
        owners += [owner] * (len(example.ids) - 1 - shared)
        for index in range(example.answer_start, len(example.ids)):
            label_positions.append(index - 1 if index - 1 < shared else offset + index - 1)
            targets.append(example.ids[index])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": _blind_mask(torch.tensor(owners)),
        "label_positions": torch.tensor(label_positions),
        "targets": torch.tensor(targets),
    }


def _shared_prefix(examples: Sequence[Encoded]) -> int:
    """Returns how many tokens all examples start with, short of any example's last."""
    columns: Iterator[tuple[int, ...]] = zip(
        *(example.ids[:-1] for example in examples), strict=False
    )
    count = 0
    for column in columns:
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _blind_mask(owner_T: Tensor) -> Tensor:
    """Returns the mask by which a token sees the shared prefix (owner -1) and its own pair so far."""
    same_TT = (owner_T[:, None] == owner_T[None, :]) | (owner_T[None, :] == -1)
    mask_TT = torch.zeros(same_TT.shape).masked_fill(
        ~same_TT.tril(), torch.finfo(torch.float32).min
    )
    return mask_TT[None, None]
