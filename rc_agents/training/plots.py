"""Draws a run's metrics, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rc_agents.training.probe import GATE, NORM

Curves = dict[str, list[tuple[int, float]]]

PLOTS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "loss": ("loss, nats a token", lambda name: name == "eval_loss" or name.startswith("loss")),
    "gates": ("gate, mean over tokens", lambda name: name.startswith(f"{GATE}/")),
    "contributions": ("norm of what is added", lambda name: name.startswith(f"{NORM}/")),
    "gradients": (
        "gradient norm, of the output's",
        lambda name: name.startswith("gradient/"),
    ),
    "routing": ("share of the output's attention", lambda name: name.startswith("routing/")),
    "similarity": (
        "cosine of what two nodes write",
        lambda name: name.startswith("similarity/"),
    ),
    "weights": ("weight in the aggregate", lambda name: name.startswith("weight/")),
}


def draw(metrics: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes a PNG for each of `PLOTS`; none without matplotlib, nor of what was not logged."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    made = []
    for name, (label, wanted) in PLOTS.items():
        curves = curves_of(metrics, wanted)
        if curves:
            made.append(folder / f"{name}.png")
            _plot(curves, label, made[-1])
    return made


def curves_of(metrics: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool]) -> Curves:
    """Returns (step, value) by name of the metric."""
    curves: Curves = {}
    for entry in metrics:
        for name, value in entry.items():
            if wanted(name):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def _plot(curves: Curves, label: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5))
    figure.subplots_adjust(left=0.08, right=0.62, top=0.95, bottom=0.11)
    axes = figure.add_subplot(xlabel="step", ylabel=label)
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=_label(name), marker=".", linewidth=1)
    axes.legend(
        fontsize="small", ncols=1 + len(curves) // 12, loc="upper left", bbox_to_anchor=(1, 1)
    )
    figure.savefig(path, dpi=110)


def _label(name: str) -> str:
    """Spells `gate/b__anchor/0` as "b -> anchor, site 0"."""
    parts = name.split("/")
    if len(parts) < 3 or "__" not in parts[1]:
        return name
    return f"{parts[1].replace('__', ' → ')}, site {parts[2]}"
