"""Means of named values between two lines of metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class Tally:
    """Sums and counts by name.

    Args:
        found: what `state` returned.
    """

    def __init__(self, found: Mapping[str, Iterable[float]] | None = None) -> None:
        self.sums: dict[str, list[float]] = {name: [*pair] for name, pair in (found or {}).items()}

    def add(self, name: str, value: float) -> None:
        """Takes in one value."""
        pair = self.sums.setdefault(name, [0.0, 0])
        pair[0] += value
        pair[1] += 1

    def state(self) -> dict[str, list[float]]:
        """Returns the sums and counts."""
        return {name: [*pair] for name, pair in self.sums.items()}

    def clear(self) -> None:
        """Starts again."""
        self.sums.clear()


def means(states: Iterable[Mapping[str, Iterable[float]]]) -> dict[str, float]:
    """Returns the mean of each name over the tallies of all processes, in the order of the names."""
    together = Tally()
    for state in states:
        for name, (total, count) in state.items():
            pair = together.sums.setdefault(name, [0.0, 0])
            pair[0] += total
            pair[1] += count
    return {name: total / count for name, (total, count) in sorted(together.sums.items())}
