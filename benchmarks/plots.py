"""The report's plots as PNG files, by matplotlib."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rc_agents.benchmarks.suite_report import Page


def draw(made: Page, folder: Path) -> list[Path]:
    """Draws every plot of a page into a folder; returns the files, none where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    written = []
    for heading, tables, _ in made.sections:
        for table in tables:
            for name, rows in table.plots.items():
                figure = Figure(figsize=(7, 0.6 + 0.28 * len(rows)), layout="constrained", dpi=110)
                axes = figure.subplots()
                values = [one.value for _, one in rows]
                below = [max(0.0, one.value - one.low) for _, one in rows]
                above = [max(0.0, one.high - one.value) for _, one in rows]
                places = range(len(rows))
                axes.errorbar(values, places, xerr=[below, above], fmt="o", capsize=3)
                axes.set_yticks(places, [method for method, _ in rows])
                axes.invert_yaxis()
                axes.set_xlabel(f"{heading}, {table.title}: {name}")
                axes.grid(axis="x", alpha=0.3)
                folder.mkdir(parents=True, exist_ok=True)
                words = re.sub(r"[^a-z0-9]+", "-", f"{heading} {table.title} {name}".lower())
                path = folder / f"{words.strip('-')}.png"
                figure.savefig(path, metadata={"Software": None})
                written.append(path)
    return written
