"""The results of `graphs` as Markdown: mean accuracy over seeds, and differences paired by question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rc_agents.benchmarks.files import read
from rc_agents.benchmarks.statistics import hierarchical, paired


def table(output: Path) -> str:
    """Returns the tables of all tasks that have results."""
    lines = []
    for folder in sorted(one for one in output.iterdir() if one.is_dir()):
        cells: dict[str, dict[int, dict[str, Any]]] = {}
        for file in sorted(folder.glob("*.json")):
            record = read(file)
            cells.setdefault(record["method"], {})[record["provenance"]["seed"]] = record
        lines += _task_table(folder.name, cells)
    return "\n".join(lines)


def _task_table(task: str, cells: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    lines = [
        f"### {task}",
        "",
        "| method | trained | seeds | accuracy, % | graph minus it |",
        "|---|---|---|---|---|",
    ]
    ours = cells.get("graph", {})
    for method, found in cells.items():
        groups = [one["right"] for one in found.values()]
        mean = hierarchical(groups, crossed=True)
        gap = ""
        if ours and method != "graph":
            seeds = sorted(ours.keys() & found.keys()) if len(found) > 1 else sorted(ours)
            others = [found[seed if seed in found else min(found)]["right"] for seed in seeds]
            one = paired([ours[seed]["right"] for seed in seeds], others)
            gap = f"{100 * one.value:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
        trained = next(iter(found.values()))["parameters"]
        lines.append(
            f"| {method} | {trained:,} | {len(found)} | {100 * mean.value:.1f} "
            f"({100 * mean.low:.1f} to {100 * mean.high:.1f}) | {gap} |"
        )
    return [*lines, ""]
