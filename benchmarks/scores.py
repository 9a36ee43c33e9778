"""What a task gives: one value an item, so that every figure has an interval and every comparison is paired."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
