"""Intervals: Wilson's for one share, and the hierarchical bootstrap over seeds and items for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # of a two-sided 95 % interval
BLOCK = 256
"""Resamples that are drawn at once."""


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
    crossed: bool = False,
    draws: int = 4000,
    seed: int = 0,
) -> Interval:
    """Returns the mean over all items with its interval by the hierarchical bootstrap.

    Each draw takes seeds with replacement, and within each of them items with replacement; its value is
    sum(values) / sum(weights).

    Args:
        groups: the items' values, by seed.
        weights: of the items, by seed; one each where left out.
        crossed: whether all seeds have the very same items: a draw then takes the same ones for every seed.
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
    pairs = [np.stack(both) for both in zip(tops, bottoms, strict=True)]
    sums = _resampled(pairs, draws, seed, crossed=crossed)
    low, high = np.quantile(sums[0] / sums[1], (0.025, 0.975))
    return Interval(value, float(low), float(high))


def _resampled(
    groups: Sequence[NDArray[np.float64]], draws: int, seed: int, *, crossed: bool = False
) -> NDArray[np.float64]:
    """Returns the columns' sums in each draw, (columns, draws); a group has (columns, items)."""
    rng = np.random.default_rng(seed)
    if crossed:
        whole = np.stack(groups)  # (seeds, columns, items)
        slots = rng.integers(len(groups), size=(draws, len(groups)))
        items = rng.integers(whole.shape[2], size=(draws, whole.shape[2]))
        blocks = [slice(start, start + BLOCK) for start in range(0, draws, BLOCK)]
        drawn = [
            np.take_along_axis(whole[slots[block]].sum(1), items[block, None], axis=2).sum(2)
            for block in blocks
        ]
        return np.concatenate(drawn).T
    chosen = rng.integers(len(groups), size=(draws, len(groups)))
    sums = np.zeros((len(groups[0]), draws))
    for number, columns in enumerate(groups):
        for slot in range(len(groups)):
            taken = np.flatnonzero(chosen[:, slot] == number)
            if taken.size:
                items = rng.integers(columns.shape[1], size=(taken.size, columns.shape[1]))
                sums[:, taken] += np.stack([column[items].sum(1) for column in columns])
    return sums


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


Columns = tuple[Sequence[float], Sequence[float]]
"""Values of the items of one seed, and their weights."""


def paired_ratio(
    ours: Sequence[Columns],
    theirs: Sequence[Columns],
    difference: Callable[[float, float], float],
    *,
    crossed: bool = False,
    draws: int = 4000,
    seed: int = 0,
) -> tuple[Interval, float]:
    """Returns the difference of two means sum(values) / sum(weights) on the same items, and a two-sided p.

    Every draw takes the same seeds and items for both. p is twice the smaller share of draws on one side of zero,
    (count + 1) / (draws + 1).

    Args:
        ours, theirs: by seed.
        difference: of the two means.
        crossed: as in `hierarchical`.
        draws: resamples.
        seed: of the resamples.

    Raises:
        ValueError: different seeds or items.
    """
    if [len(values) for values, _ in ours] != [len(values) for values, _ in theirs]:
        counts = [[len(values) for values, _ in side] for side in (ours, theirs)]
        raise ValueError(f"paired items must match, got {counts[0]} and {counts[1]} by seed")
    groups = [
        np.asarray([*mine, *other], dtype=np.float64)
        for mine, other in zip(ours, theirs, strict=True)
    ]
    whole = sum((group.sum(1) for group in groups), np.zeros(4))
    value = difference(whole[0] / whole[1], whole[2] / whole[3])
    a, b, c, d = _resampled(groups, draws, seed, crossed=crossed)
    found = np.asarray([difference(one, other) for one, other in zip(a / b, c / d, strict=True)])
    low, high = np.quantile(found, (0.025, 0.975))
    beyond = min(int((found <= 0).sum()), int((found >= 0).sum()))
    return Interval(value, float(low), float(high)), min(1.0, 2 * (beyond + 1) / (draws + 1))
