"""Scores over several seeds, and two methods' scores on the same items: values with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rc_agents.benchmarks.scores import KINDS, Score
from rc_agents.benchmarks.statistics import Interval, hierarchical, paired_ratio, wilson


def total(scores: Sequence[Score], *, same_items: bool = False) -> Interval:
    """Returns what is printed of one measure over several seeds, with its interval.

    One seed of yes and no has Wilson's interval, everything else the hierarchical bootstrap's.

    Args:
        scores: by seed.
        same_items: whether every seed has the very same items, which then are drawn for all of them at once.
    """
    kind = KINDS[scores[0].kind]
    weights = [one.weights for one in scores]
    shares = scores[0].kind == "share" and set(scores[0].values) <= {0.0, 1.0}
    if len(scores) == 1 and weights == [None] and shares:
        values = scores[0].values
        found = wilson(int(sum(values)), len(values))
    else:
        filled = [one.weights or [1.0] * len(one.values) for one in scores]
        found = hierarchical([one.values for one in scores], filled, crossed=same_items)
    return Interval(kind.shown(found.value), kind.shown(found.low), kind.shown(found.high))


@dataclass(frozen=True)
class Difference:
    """How far one method is from another on the same items.

    Attributes:
        interval: in the unit of the kind, or in percent where `ratio`.
        p: two-sided, of no difference, by the bootstrap.
        better: the first method, the second, or neither: 1, -1, 0. An interval that holds zero says neither.
    """

    interval: Interval
    p: float
    ratio: bool
    better: int


def difference(
    ours: Sequence[Score], theirs: Sequence[Score], *, same_items: bool = False
) -> Difference:
    """Returns `ours` minus `theirs`, by the paired hierarchical bootstrap over seeds and items.

    Args:
        ours, theirs: one measure of two methods, by seed, in the same order of seeds.
        same_items: as in `total`.

    Raises:
        ValueError: other seeds, items or kinds.
    """
    kinds = {one.kind for one in (*ours, *theirs)}
    if len(kinds) != 1:
        raise ValueError(f"only scores of one kind can be compared, got {sorted(kinds)}")
    kind = KINDS[kinds.pop()]

    def columns(scores: Sequence[Score]) -> list[tuple[Sequence[float], Sequence[float]]]:
        return [(one.values, one.weights or [1.0] * len(one.values)) for one in scores]

    def shown(mine: float, other: float) -> float:
        if kind.ratio:
            return 100 * math.expm1(mine - other)
        return kind.shown(mine) - kind.shown(other)

    interval, p = paired_ratio(columns(ours), columns(theirs), shown, crossed=same_items)
    sign = 0 if interval.low <= 0 <= interval.high else (1 if interval.low > 0 else -1)
    direction = {"higher": 1, "lower": -1, "neither": 0}[ours[0].better]
    return Difference(interval, p, kind.ratio, sign * direction)
