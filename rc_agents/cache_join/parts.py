"""Rows of several batches, and how their tensors are laid side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import CoupledCache


class Part(NamedTuple):
    """Rows of a batch that go on.

    Attributes:
        cache: of the batch.
        rows: which of its rows, (R,).
        columns: how many of its last columns hold all of them; those before hold padding alone.
    """

    cache: CoupledCache
    rows: Tensor
    columns: int


def rows(
    held: Sequence[Tensor | None],
    parts: Sequence[Part],
    fit: Callable[[Tensor, int], Tensor] = lambda states, place: states,
) -> Tensor:
    """Joins the parts' rows, (R, ...); zeros where a part holds nothing.

    Args:
        held: of each part, None for nothing.
        parts: in order.
        fit: a part's own rows and its place -> the same in the shape that all parts have.
    """
    taken = [
        None if states is None else fit(states[part.rows.to(states.device)], place)
        for place, (states, part) in enumerate(zip(held, parts, strict=True))
    ]
    pattern = next(states for states in taken if states is not None)
    return torch.cat(
        [
            pattern.new_zeros(len(part.rows), *pattern.shape[1:]) if states is None else states
            for states, part in zip(taken, parts, strict=True)
        ]
    )


def widened(tensor: Tensor, width: int, axis: int) -> Tensor:
    """Zeros in front, up to `width` along the axis."""
    missing = width - tensor.shape[axis]
    if not missing:
        return tensor
    shape = [*tensor.shape]
    shape[axis] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=axis)
