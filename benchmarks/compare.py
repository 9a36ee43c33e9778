"""Two methods, or two folders of results, measure by measure: paired bootstrap tests on the same items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rc_agents.benchmarks.collected import (
    Record,
    Results,
    compared,
    measures,
    method_of,
    over_seeds,
    scores,
)
from rc_agents.benchmarks.intervals import Difference
from rc_agents.benchmarks.statistics import Interval
from rc_agents.benchmarks.suite_report import gain, within

from rc_agents.errors import DataError

HEAD = ("setting", "measure", "A", "B", "seeds", "A against B (95 %)")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Two methods in one measure.

    Attributes:
        setting, measure: where, and what.
        kind: of the measure's scores.
        seeds: in which both were asked the same things; none where they never were.
        a, b: each method's value over these seeds.
        difference: of the first from the second.
    """

    setting: str
    measure: str
    kind: str
    seeds: tuple[int, ...] = ()
    a: Interval | None = None
    b: Interval | None = None
    difference: Difference | None = None

    def cells(self) -> tuple[str, ...]:
        """Returns it as text, one piece a column of `HEAD`."""
        if self.a is None or self.b is None or self.difference is None:
            why = "left out: they were asked different things"
            return self.setting, self.measure, "-", "-", "-", why
        values = within(self.a, self.kind), within(self.b, self.kind)
        told = gain(self.difference, self.kind)
        return self.setting, self.measure, *values, ", ".join(map(str, self.seeds)), told


def methods(folder: Path, one: str, other: str) -> list[Row]:
    """Returns how method `one` differs from `other` in every setting and measure that both have.

    Raises:
        DataError: no setting has both.
    """
    results = Results.of(folder)
    rows: list[Row] = []
    for setting in results.plan["settings"]:
        scored = results.scored(setting)
        if one in scored and other in scored:
            rows += _rows(setting, scored[one], scored[other])
    if not rows:
        setting = next(iter(results.plan["settings"]))
        method_of(results, setting, one)
        method_of(results, setting, other)
        raise DataError(f"no setting has both {one!r} and {other!r}")
    return rows


def folders(one: Path, other: Path) -> list[Row]:
    """Returns how the same methods differ between two folders of results.

    Raises:
        DataError: they have no cell in common.
    """
    mine, theirs = Results.of(one), Results.of(other)
    rows: list[Row] = []
    for setting in mine.plan["settings"]:
        if setting not in theirs.plan["settings"]:
            continue
        scored, others = mine.scored(setting), theirs.scored(setting)
        for method in scored:
            if method in others:
                rows += _rows(f"{setting}: {method}", scored[method], others[method])
    if not rows:
        raise DataError(f"{one} and {other} have no setting and method in common")
    return rows


def _rows(name: str, mine: Mapping[int, Record], other: Mapping[int, Record]) -> Iterator[Row]:
    for group, found in measures({"a": mine}).items():
        for measure in found:
            key = f"{group}/{measure}"
            result = compared(mine, other, key)
            kind = scores(mine, key)[0].kind
            if result is None:
                if any(key in one["scores"] for one in other.values()):
                    yield Row(setting=name, measure=key, kind=kind)
                continue
            difference, seeds = result
            each = ({seed: side[seed] for seed in seeds} for side in (mine, other))
            a, b = (over_seeds(side, key) for side in each)
            yield Row(
                setting=name,
                measure=key,
                kind=kind,
                seeds=tuple(seeds),
                a=a,
                b=b,
                difference=difference,
            )


def table(rows: list[Row]) -> str:
    """Returns rows as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines) + "\n"
