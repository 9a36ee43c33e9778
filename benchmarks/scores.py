"""What a task gives: one value an item, so that every figure has an interval and every comparison is paired."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rc_agents.benchmarks.statistics import Interval, hierarchical, paired_ratio, wilson

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Kind:
    """How a score is read.

    Attributes:
        shown: from the mean sum(values) / sum(weights) to what is printed; increasing.
        unit: of that.
        digits: behind the point.
        ratio: whether two of them are compared by their quotient, in percent, rather than by their difference.
    """

    shown: Callable[[float], float]
    unit: str
    digits: int
    ratio: bool = False


def _percent(share: float) -> float:
    return 100 * share


def _itself(value: float) -> float:
    return value


KINDS: Mapping[str, Kind] = {
    "share": Kind(_percent, "%", 1),
    "perplexity": Kind(math.exp, "", 2, ratio=True),
    "bits": Kind(lambda nats: nats / math.log(2), "bits a byte", 3),
    "nats": Kind(_itself, "nats", 3),
    "seconds": Kind(_itself, "s", 3),
    "count": Kind(_itself, "", 1),
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measure of a method, item by item.

    Attributes:
        values: of the items, in an order that is the same for every method.
        weights: what they are divided by, such as tokens of a document; one each where left out.
        kind: name in `KINDS`.
        better: which way is good.

    Raises:
        ValueError: an unknown kind, no item, or values and weights of different lengths.
    """

    values: Sequence[float]
    weights: Sequence[float] | None = None
    kind: str = "share"
    better: Better = "higher"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"a score's kind is one of {', '.join(KINDS)}, not {self.kind!r}; name a new one in KINDS"
            )
        if not self.values or (self.weights is not None and len(self.weights) != len(self.values)):
            weights = "none" if self.weights is None else len(self.weights)
            raise ValueError(
                f"a score needs items with a weight each, got {len(self.values)} values and {weights} weights"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data; outcomes that are only 0 and 1 as one string."""
        values: Any = [round(float(value), 6) for value in self.values]
        if set(values) <= {0.0, 1.0} and self.kind == "share":
            values = "".join("01"[value == 1.0] for value in values)
        found: dict[str, Any] = {"kind": self.kind, "better": self.better, "values": values}
        if self.weights is not None:
            found["weights"] = [round(float(weight), 6) for weight in self.weights]
        return found

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Score:
        """Returns the score that `to_dict` wrote."""
        values = data["values"]
        if isinstance(values, str):
            values = [float(bit) for bit in values]
        return cls(
            values=values, weights=data.get("weights"), kind=data["kind"], better=data["better"]
        )


def total(scores: Sequence[Score]) -> Interval:
    """Returns what is printed of one measure over several seeds, with its interval.

    One seed of yes and no has Wilson's interval, everything else the hierarchical bootstrap's.
    """
    kind = KINDS[scores[0].kind]
    weights = [one.weights for one in scores]
    if len(scores) == 1 and weights == [None] and set(scores[0].values) <= {0.0, 1.0}:
        values = scores[0].values
        found = wilson(int(sum(values)), len(values))
    else:
        filled = [one.weights or [1.0] * len(one.values) for one in scores]
        found = hierarchical([one.values for one in scores], filled)
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


def difference(ours: Sequence[Score], theirs: Sequence[Score]) -> Difference:
    """Returns `ours` minus `theirs`, by the paired hierarchical bootstrap over seeds and items.

    Args:
        ours, theirs: one measure of two methods, by seed, in the same order of seeds.

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

    interval, p = paired_ratio(columns(ours), columns(theirs), shown)
    sign = 0 if interval.low <= 0 <= interval.high else (1 if interval.low > 0 else -1)
    direction = {"higher": 1, "lower": -1, "neither": 0}[ours[0].better]
    return Difference(interval, p, kind.ratio, sign * direction)
