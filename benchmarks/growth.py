"""Where the time of a coupled pass goes, and how it grows: `make bench-growth`, a JSON line last.

SmolLM2-135M (float32) with copies of itself over the same weights, multi-bilateral, lockstep, one thread. Hooks on the
models' blocks and on the bridges take the time; what is left is embeddings, output layers, and the pass itself (checks,
exchanges, switching between the models). Grown one at a time from two models, five sites, 64 tokens, one row: models
2 to 6, sites 1 to 10, tokens 64 to 2,048, rows 1 to 16; and one decoded token behind 64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import rc_agents
from rc_agents import packaged
from rc_agents.provenance import provenance

MODEL = "package:smollm2-135m"
BASE = {"models": 2, "sites": 5, "tokens": 64, "rows": 1}
GROWN: dict[str, list[int]] = {
    "models": [2, 3, 4, 5, 6],
    "sites": [1, 2, 5, 10],
    "tokens": [64, 256, 1024, 2048],
    "rows": [1, 4, 16],
}


class Clock:
    """Seconds spent inside the modules that it watches, by kind; those of one kind do not nest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.begun: dict[int, float] = {}
        self.handles: list[Any] = []

    def watch(self, kind: str, module: torch.nn.Module) -> None:
        """Adds the module's time to a kind's; a tap's exchange behind a block does not count to the block."""

        def before(module: Any, *args: Any) -> None:
            self.begun[id(module)] = time.perf_counter()

        def after(module: Any, *args: Any) -> None:
            spent = time.perf_counter() - self.begun.pop(id(module))
            self.seconds[kind] = self.seconds.get(kind, 0.0) + spent

        self.handles += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, prepend=True),
        ]

    def stop(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()


@contextmanager
def watched(model: rc_agents.CoupledForCausalLM) -> Iterator[Clock]:
    """A clock on every block and bridge of an ensemble."""
    clock = Clock()
    for one in model.models.values():
        layers = next(
            part
            for part in one.modules()
            if isinstance(part, torch.nn.ModuleList) and len(part) == one.config.num_hidden_layers
        )
        for block in layers:
            clock.watch("blocks", block)
    for edge in model.edges:
        for site in range(len(model.sites)):
            clock.watch("bridges", model.bridge(edge, site))
    try:
        yield clock
    finally:
        clock.stop()


def ensemble(frozen: Any, models: int, sites: int) -> rc_agents.CoupledForCausalLM:
    """So many models over the same weights."""
    twins = {f"twin{number}": frozen for number in range(1, models)}
    return rc_agents.couple(frozen, twins, sites=sites, alignment="shared")


def point(
    frozen: Any, repeats: int, models: int, sites: int, tokens: int, rows: int
) -> dict[str, Any]:
    """Seconds of a pass, of as many frozen passes, and the shares of blocks and bridges."""
    model = ensemble(frozen, models, sites)
    ids = torch.randint(100, 40000, (rows, tokens), generator=torch.Generator().manual_seed(0))

    def alone() -> None:
        for number in range(models):
            frozen(input_ids=ids, use_cache=False, logits_to_keep=slice(0, 0) if number else 0)

    return timed(model, lambda: model(input_ids=ids, use_cache=False), alone, repeats)


def step(frozen: Any, repeats: int, models: int, sites: int) -> dict[str, Any]:
    """The same for one decoded token behind 64, 16 at a time."""
    model = ensemble(frozen, models, sites)
    ids = torch.randint(100, 40000, (1, 80), generator=torch.Generator().manual_seed(0))
    cache = model(input_ids=ids[:, :64], use_cache=True).past_key_values
    own = frozen(input_ids=ids[:, :64], use_cache=True).past_key_values

    def run(call: Callable[..., Any], cache: Any, **more: Any) -> None:
        for k in range(64, 80):
            call(input_ids=ids[:, k : k + 1], past_key_values=cache, use_cache=True, **more)
        cache.crop(-16)

    def alone() -> None:
        for number in range(models):
            run(frozen, own, logits_to_keep=slice(0, 0) if number else 0)

    return timed(model, lambda: run(model, cache), alone, repeats)


def timed(
    model: Any, coupled: Callable[[], Any], alone: Callable[[], Any], repeats: int
) -> dict[str, Any]:
    """Medians of interleaved rounds, after one that does not count."""
    rounds: list[dict[str, float]] = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        alone()
        frozen = time.perf_counter() - start
        start = time.perf_counter()
        coupled()
        own = time.perf_counter() - start
        with watched(model) as clock:
            start = time.perf_counter()
            coupled()
            seen = time.perf_counter() - start
        if number:
            parts = {kind: spent / seen for kind, spent in clock.seconds.items()}
            rounds.append({"ratio": own / frozen, "seconds": own, **parts})
    return {
        name: round(statistics.median(one[name] for one in rounds), 4) for name in rounds[0]
    } | {
        "lowest": round(min(one["ratio"] for one in rounds), 4),
        "highest": round(max(one["ratio"] for one in rounds), 4),
    }


def main() -> None:
    """Prints a table, writes a record and a plot, prints the record as a JSON line last."""
    parser = argparse.ArgumentParser(description="Where a coupled pass's time goes.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frozen = AutoModelForCausalLM.from_pretrained(packaged.resolve(MODEL), dtype=torch.float32)
    rows = []
    print(
        f"{'grown':8} {'to':>5} {'ratio':>7} {'lowest':>7} {'highest':>8} {'blocks':>7} {'bridges':>8}"
    )
    with torch.inference_mode():
        for name, values in GROWN.items():
            for value in values:
                at = {**BASE, name: value}
                repeats = max(2, arguments.repeats // (1 + at["tokens"] * at["rows"] // 1024))
                rows.append({"grown": name, "to": value, **point(frozen, repeats, **at)})
                show(rows[-1])
        for models in (2, 4):
            rows.append(
                {"grown": "step", "to": models, **step(frozen, arguments.repeats, models, 5)}
            )
            show(rows[-1])
    record = {"benchmark": "growth", "base": BASE, "points": rows, **provenance(0)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "growth.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, arguments.output / "growth.png")
    print(json.dumps(record))


def show(row: dict[str, Any]) -> None:
    """Prints one line."""
    print(
        f"{row['grown']:8} {row['to']:5} {row['ratio']:7.3f} {row['lowest']:7.3f} {row['highest']:8.3f} "
        f"{row['blocks']:7.1%} {row['bridges']:8.1%}",
        flush=True,
    )


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws the ratios and the bridges' share."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(GROWN), figsize=(13, 3.2), sharey=True)
    for axis, name in zip(axes, GROWN, strict=True):
        points = [row for row in rows if row["grown"] == name]
        where = range(len(points))
        low = [row["ratio"] - row["lowest"] for row in points]
        high = [row["highest"] - row["ratio"] for row in points]
        axis.errorbar(where, [row["ratio"] for row in points], [low, high], marker="o", capsize=3)
        axis.bar(where, [row["bridges"] for row in points], color="tab:orange")
        axis.set_xticks(list(where), [str(row["to"]) for row in points])
        axis.set_xlabel(name)
    axes[0].set_ylabel("coupled / sum of frozen\nbars: bridges' share")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
