"""Runs the cells of a suite that are missing or out of date; a kill loses the one cell that it hits."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rc_agents.benchmarks import files
from rc_agents.benchmarks.cells import is_current
from rc_agents.benchmarks.leaks import Leak, check
from rc_agents.benchmarks.methods import Bench
from rc_agents.benchmarks.suite import Suite
from rc_agents.benchmarks.suite_cell import Cell, fail, run_cell, summary

PLAN = "suite.json"
"""What the report expects, beside the cells."""


def plan(suite: Suite) -> dict[str, Any]:
    """Returns what a suite runs, as plain data."""
    parts = {
        part.setting.name: {
            "methods": list(part.methods),
            "tasks": list(part.tasks),
            "seeds": list(part.seeds),
            "leaks": part.leaks,
        }
        for part in suite.parts
    }
    about = {"suite": suite.name, "about": suite.about}
    beside = {"absent": dict(suite.absent), "published": dict(suite.published)}
    return about | {"settings": parts} | beside


@dataclass
class Run:
    """One run of a suite.

    Args:
        suite: what to run.
        whole: the suite of which that is a part, for the report; itself by default.
        output: folder of the results.
        folder: for what is kept between runs: states, answers, fitted bridges.
        device: where models go.
        minutes: after which no further cell begins; None for no limit.
        say: prints a line.

    Attributes:
        outcomes: what became of each cell, by name: done, up to date, failed and why, or left for another time.
    """

    suite: Suite
    output: Path
    folder: Path
    device: str | None = None
    minutes: float | None = None
    say: Callable[[str], None] = print
    whole: Suite | None = None
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    broken: dict[str, Exception] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    def all_cells(self) -> list[Cell]:
        """Returns every cell: seed by seed, so that an early end leaves whole seeds."""
        seeds = sorted({seed for part in self.suite.parts for seed in part.seeds})
        return [
            Cell(self.suite.name, part, name, seed)
            for seed in seeds
            for part in self.suite.parts
            if seed in part.seeds
            for name in part.methods
        ]

    def __call__(self) -> list[str]:
        """Runs what is missing or out of date; returns the names of the cells that failed.

        Raises:
            Leak: a test text is, or nearly is, one that trains.
        """
        begun, cells = time.monotonic(), self.all_cells()
        self.outcomes = dict.fromkeys((cell.name for cell in cells), "left")
        self.check_leaks()
        files.write(self.output / PLAN, plan(self.whole or self.suite))
        for number, (cell, bench) in enumerate(self._with_benches(cells), start=1):
            head = f"[{number}/{len(cells)}] {cell.name}"
            if self.minutes is not None and time.monotonic() - begun > 60 * self.minutes:
                left = len(cells) - number + 1
                self.say(f"the {self.minutes:g} minutes are over; run again for the other {left}")
                break
            clock = time.perf_counter()
            try:
                if error := self.broken.get(cell.part.setting.name):
                    raise error
                if is_current(cell.path(self.output), cell.key(bench)):
                    self.outcomes[cell.name] = "up to date"
                    self.say(f"{head}: up to date")
                    continue
                record = run_cell(cell, bench, self.output)
            except Exception as error:
                traceback.print_exc()
                self.failed.append(cell.name)
                fail(cell, self.output, error)
                why = self.outcomes[cell.name] = f"failed: {type(error).__name__}: {error}"
                self.say(f"{head}: {why}")
                continue
            self.outcomes[cell.name] = "done"
            self.seconds.append(time.perf_counter() - clock)
            self.say(f"{head}: {summary(record)}{self._left(cells[number:])}")
        return self.failed

    def states(self) -> Iterator[tuple[str, str]]:
        """Yields every cell's name, and whether it is missing, out of date or up to date; runs and teaches nothing."""
        for cell, bench in self._with_benches(self.all_cells()):
            path = cell.path(self.output)
            if not path.is_file():
                yield cell.name, "missing"
            elif bench.untaught:
                yield cell.name, f"unknown: {', '.join(bench.untaught)} is not taught here"
            else:
                done = is_current(path, cell.key(bench))
                yield cell.name, "up to date" if done else "out of date"

    def check_leaks(self) -> None:
        """Refuses a suite whose test texts train (`Part.leaks` is the exception); notes settings without their data."""
        for part in self.suite.parts:
            try:
                for seed in part.seeds if not part.leaks else ():
                    check(part, Bench(part.setting, seed, self.folder, self.device))
            except Leak:
                raise
            except Exception as error:
                self.broken[part.setting.name] = error

    def _with_benches(self, cells: list[Cell]) -> Iterator[tuple[Cell, Bench]]:
        """Yields each cell with its bench, of which one is kept: it holds the models."""
        at: tuple[str, int] | None = None
        for cell in cells:
            here = (cell.part.setting.name, cell.seed)
            if here != at:
                bench = Bench(cell.part.setting, cell.seed, self.folder, self.device)
                at = here
            yield cell, bench

    def _left(self, cells: list[Cell]) -> str:
        """How long those without a file may take: as long as the method took in another seed, else as the mean cell."""
        if not cells or not self.seconds:
            return ""
        mean = sum(self.seconds) / len(self.seconds)
        missing = [cell for cell in cells if not cell.path(self.output).exists()]
        minutes = sum(self._last(cell) or mean for cell in missing) / 60
        return f"; about {minutes:.0f} min left" if minutes >= 1 else ""

    def _last(self, cell: Cell) -> float | None:
        """Seconds that a cell took in another seed."""
        place = self.output / cell.part.setting.name
        for path in sorted(place.glob(f"{cell.method}-*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError):
                return float(files.read(path)["seconds"])
        return None
