"""Intervals: Wilson's for one share, and the hierarchical bootstrap over seeds and items for everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(hits: int, count: int) -> Interval:
    """Returns a share with its interval (Wilson, 1927).

    Raises:
        ValueError: no item, or more hits than items.
    """
    if count < 1 or not 0 <= hits <= count:
        raise ValueError(f"a share needs 0 <= hits <= count and an item, got {hits} of {count}")
    share = hits / count
    middle = share + Z * Z / (2 * count)
    width = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return Interval(share, max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale))


def hierarchical(
    groups: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]] | None = None,
    *,
    draws: int = 4000,
    seed: int = 0,
) -> Interval:
    """Returns the mean over all items with its interval by the hierarchical bootstrap.

    Each draw takes seeds with replacement, and within each of them items with replacement; its value is
    sum(values) / sum(weights).

    Args:
        groups: the items' values, by seed.
        weights: of the items, by seed; one each where left out.
        draws: resamples.
        seed: of the resamples.

    Raises:
        ValueError: a seed without items.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("the bootstrap needs at least one seed, and items in every one")
    tops = [np.asarray(group, dtype=np.float64) for group in groups]
    bottoms = [
        np.ones_like(top) if weights is None else np.asarray(weights[place], dtype=np.float64)
        for place, top in enumerate(tops)
    ]
    value = float(sum(top.sum() for top in tops) / sum(bottom.sum() for bottom in bottoms))
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(tops), size=(draws, len(tops)))
    sums = np.zeros((2, draws))
    for number, (top, bottom) in enumerate(zip(tops, bottoms, strict=True)):
        for slot in range(len(tops)):
            taken = np.flatnonzero(chosen[:, slot] == number)
            if taken.size:
                items = rng.integers(len(top), size=(taken.size, len(top)))
                sums[:, taken] += _sums(top, items), _sums(bottom, items)
    low, high = np.quantile(sums[0] / sums[1], (0.025, 0.975))
    return Interval(value, float(low), float(high))


def _sums(values: NDArray[np.float64], items: NDArray[np.int64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values[items].sum(1)
    return found


def paired(
    groups: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]],
    *,
    draws: int = 4000,
    seed: int = 0,
) -> Interval:
    """Returns the mean difference `groups` - `others` on the same items, with its hierarchical interval.

    Raises:
        ValueError: different seeds or items.
    """
    if [len(one) for one in groups] != [len(one) for one in others]:
        raise ValueError(
            f"paired items must match, got {[len(one) for one in groups]} and {[len(one) for one in others]} by seed"
        )
    differences = [
        [a - b for a, b in zip(one, other, strict=True)]
        for one, other in zip(groups, others, strict=True)
    ]
    return hierarchical(differences, draws=draws, seed=seed)
