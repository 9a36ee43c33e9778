"""The cells of a folder of results, as the report and comparisons read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_agents.benchmarks import files
from rc_agents.benchmarks.intervals import Difference, difference, total
from rc_agents.benchmarks.report import CONTROLS as TRANSFER_CONTROLS
from rc_agents.benchmarks.runner import PLAN
from rc_agents.benchmarks.scores import Score
from rc_agents.benchmarks.statistics import Interval

from rc_agents.errors import DataError, nearest

CONTROLS = (*TRANSFER_CONTROLS, "agent_anchor", "agent_lora")
"""Methods that have no specialist's knowledge."""
COUPLED = (
    "coupled",
    "unilateral",
    "star_bilateral",
    "multi_bilateral",
    "hybrid",
    "added_later",
    "agent_coupled",
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Everything in a folder.

    Attributes:
        plan: what the suite runs, see `runner.plan`.
        cells: by setting, method and seed.
        sweep: what `benchmarks.handoffs` has measured, None where it has not.
    """

    plan: Mapping[str, Any]
    cells: Mapping[str, Mapping[str, Mapping[int, Record]]]
    sweep: Record | None = None

    @classmethod
    def of(cls, folder: Path) -> Results:
        """Reads a folder.

        Raises:
            DataError: there is no suite's plan in it.
        """
        try:
            plan = files.read(folder / PLAN)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder} holds no results of a suite ({PLAN} is missing); run: rc-agents bench --suite NAME"
            ) from error
        cells: dict[str, dict[str, dict[int, Record]]] = {}
        for setting, part in plan["settings"].items():
            for method in part["methods"]:
                for seed in part["seeds"]:
                    path = folder / setting / f"{method}-{seed}.json"
                    if path.is_file():
                        record = files.read(path)
                        cells.setdefault(setting, {}).setdefault(method, {})[seed] = record
        file = folder / "sweep.json"
        return cls(plan, cells, files.read(file) if file.is_file() else None)

    def scored(self, setting: str) -> dict[str, dict[int, Record]]:
        """Returns the cells of a setting that have scores, by method in the suite's order."""
        found = {}
        for method in self.plan["settings"][setting]["methods"]:
            each = self.cells.get(setting, {}).get(method, {})
            each = {seed: one for seed, one in sorted(each.items()) if one.get("scores")}
            if each:
                found[method] = each
        return found

    def absent(self, setting: str) -> list[str]:
        """Returns a line for every cell or task that is not there, with its reason."""
        part, lines = self.plan["settings"][setting], []
        for method in part["methods"]:
            each = self.cells.get(setting, {}).get(method, {})
            missing = [seed for seed in part["seeds"] if seed not in each]
            if missing:
                why = self.plan["absent"].get(f"{setting} {method}") or self.plan["absent"].get(
                    method, "not run"
                )
                lines.append(f"{method}, seed {', '.join(map(str, missing))}: {why}")
            failed = {one["failed"] for one in each.values() if "failed" in one}
            lines += [f"{method}: failed: {why}" for why in sorted(failed)]
            codes = {one["code"] for one in each.values() if "code" in one}
            if len(codes) > 1:
                lines.append(f"{method}: made by {len(codes)} versions of the benchmark's code")
            reasons = {one["not_applicable"] for one in each.values() if "not_applicable" in one}
            lines += [f"{method}: not applicable: {why}" for why in sorted(reasons)]
            tasks = {pair for one in each.values() for pair in (one.get("absent") or {}).items()}
            lines += [f"{method}, task {name}: {why}" for name, why in sorted(tasks)]
        return lines


def measures(scored: Mapping[str, Mapping[int, Record]]) -> dict[str, list[str]]:
    """Returns the measures by group, in the order in which cells have them."""
    found: dict[str, list[str]] = {}
    for each in scored.values():
        for record in each.values():
            for name in record["scores"]:
                group, measure = name.split("/", 1)
                if measure not in found.setdefault(group, []):
                    found[group].append(measure)
    return found


def scores(each: Mapping[int, Record], name: str, seeds: Sequence[int] = ()) -> list[Score]:
    """Returns one measure of one method by seed; of these seeds only, where some are named."""
    return [
        Score.of(record["scores"][name])
        for seed, record in sorted(each.items())
        if name in record["scores"] and (not seeds or seed in seeds)
    ]


def same_items(each: Mapping[int, Record], seeds: Sequence[int]) -> bool:
    """Whether a method was asked the very same in every one of these seeds."""
    return len({each[seed]["data"] for seed in seeds}) == 1


def over_seeds(each: Mapping[int, Record], name: str) -> Interval:
    """Returns one measure of one method with its interval; a cell taken over from another seed counts once."""
    own = {
        seed: one
        for seed, one in each.items()
        if name in one["scores"] and one.get("taken_from", seed) == seed
    } or each
    return total(scores(own, name), same_items=same_items(own, [*own]))


def compared(
    mine: Mapping[int, Record], other: Mapping[int, Record], name: str
) -> tuple[Difference, list[int]] | None:
    """Returns how far one method is from another in a measure, over the seeds in which both were asked the same.

    None where there is no such seed.
    """
    both = [
        seed
        for seed in sorted(mine.keys() & other.keys())
        if name in mine[seed]["scores"]
        and name in other[seed]["scores"]
        and mine[seed]["data"] == other[seed]["data"]
    ]
    if not both:
        return None
    ours, theirs = scores(mine, name, both), scores(other, name, both)
    return difference(ours, theirs, same_items=same_items(mine, both)), both


def best_control(scored: Mapping[str, Mapping[int, Record]], name: str) -> str | None:
    """Returns the best method without a specialist's knowledge in a measure, None where there is none."""
    best: tuple[float, str] | None = None
    for control in CONTROLS:
        found = scores(scored.get(control, {}), name)
        if found and found[0].better != "neither":
            sign = 1 if found[0].better == "higher" else -1
            value = sign * over_seeds(scored[control], name).value
            best = max(best or (value, control), (value, control))
    return best[1] if best else None


def method_of(results: Results, setting: str, name: str) -> Mapping[int, Record]:
    """Returns a method's cells.

    Raises:
        DataError: it has none.
    """
    scored = results.scored(setting)
    if name not in scored:
        raise DataError(
            f"{setting} has no results of {name!r}; {nearest(name, list(scored)) if scored else 'it has none at all'}"
        )
    return scored[name]
