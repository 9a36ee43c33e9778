"""The knowledge-transfer benchmark: `python -m rc_agents.benchmarks.transfer --setting same_family_any --seeds 0 1 2`.

A cell that is there and up to date is skipped, so a killed run goes on where it was; `--report` prints the tables from
the cells' files alone.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.cells import Cell
from rc_agents.benchmarks.methods import METHODS, Bench
from rc_agents.benchmarks.report import report
from rc_agents.benchmarks.settings import SETTINGS, Setting

from rc_agents import packaged

OUTPUT = Path(__file__).parent / "results" / "transfer"


def run(
    setting: Setting,
    methods: list[str],
    seeds: list[int],
    output: Path,
    folder: Path,
    device: str | None = None,
) -> list[str]:
    """Runs the cells that are missing or out of date; returns those that failed.

    Args:
        setting: of the benchmark.
        methods, seeds: its cells.
        output: folder of the results.
        folder: for what is kept between runs.
        device: where models go.
    """
    failed = []
    for seed in seeds:
        bench = Bench(setting, seed, folder, device)
        for method in methods:
            cell = Cell(setting, method, seed)
            name = f"{setting.name} {method} seed {seed}"
            if cell.is_done(output, cell.key(bench)):
                print(f"{name}: up to date", flush=True)
                continue
            begun = time.perf_counter()
            try:
                record = cell.run(bench, output)
            except Exception:
                traceback.print_exc()
                failed.append(name)
                continue
            why = record.get("not_applicable")
            done = f"not applicable: {why}" if why else summary(record)
            print(f"{name}: {done} ({time.perf_counter() - begun:.0f} s)", flush=True)
    return failed


def summary(record: dict[str, Any]) -> str:
    """Returns a cell's main scores in one line."""
    parts = []
    for world, found in record["scores"]["worlds"].items():
        for name, one in found.items():
            if "exact" in one:
                right = one["exact"]["outcomes"]
                parts.append(f"{world} {name} {right.count('1')}/{len(right)}")
    same = record["scores"]["own"]["same"]
    return ", ".join([*parts, f"own answers kept {same.count('1')}/{len(same)}"])


def small(setting: Setting, items: int) -> Setting:
    """Returns the setting with a handful of items of each kind, to try things out; results get a name of their own."""
    sizes = replace(
        setting.sizes,
        held_out=items,
        validation=items,
        strangers=items,
        questions=items,
        documents=items,
    )
    return replace(setting, name=f"{setting.name}-{items}", sizes=sizes)


def main() -> None:
    """Runs cells, or prints the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--setting", nargs="+", default=["same_family_any"], choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--kept", type=Path, help="folder for states and the anchor's answers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--items", type=int, help="only so many items of each kind, as a trial")
    parser.add_argument("--report", action="store_true", help="print the tables, run nothing")
    arguments = parser.parse_args()
    if arguments.report:
        print(report(arguments.output), end="")
        return
    torch.set_num_threads(arguments.threads)
    folder = arguments.kept or packaged.cache_dir() / "transfer"
    failed = []
    for name in arguments.setting:
        setting = SETTINGS[name]
        if arguments.items:
            setting = small(setting, arguments.items)
        failed += run(
            setting,
            arguments.methods,
            arguments.seeds,
            arguments.output,
            folder,
            arguments.device,
        )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
