"""A graph whose level one sees: `python -m rc_agents.benchmarks.graph_pictures`; a table and a JSON line last.

A small vision transformer, trained on drawn shapes and frozen, shows its mean state; the frozen SmolLM2-135M that hears
it reads "What does the picture show?" with one of four captions as its answer, and never sees a pixel. One caption is
right, one has its colour alone, one its shape alone, one neither, so that neither word is enough. Nothing but the
edges and the output trains. Beside the graph:

    head        a perceptron with as many trained values on the eye's state and the reader's last state, side by side
    shuffled    the trained graph with the pictures of the questions exchanged
    reader      the graph without its eye

On pictures of combinations of colour and shape that training showed (`seen`) and never showed (`unseen`).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.files import write
from rc_agents.benchmarks.pictures import COLOURS, SHAPES, Counts, Pictures, Splits, caption, splits
from rc_agents.benchmarks.small_eye import trained_eye
from rc_agents.benchmarks.statistics import paired, wilson
from transformers import ViTModel

from rc_agents import graph as graphs
from rc_agents.provenance import provenance

READER = "package:smollm2-135m"
ASKED = "What does the picture show?"
OUTPUT = Path("benchmarks/results/graph_pictures")
FIRST = 0  # the seed that chooses learning rates
COUNTS = Counts(train=40, validation=4, test=8, unseen=20)
CONFIG = graphs.GraphTrainConfig(steps=200, batch_size=32, weight_decay=0.01, eval_steps=25)
RATES = (1e-3, 3e-3)  # the better one on validation with the first seed, for each method
EYE: dict[str, Any] = {"pooling": "mean"}


def graph_config(at: int | float = 20) -> graphs.GraphConfig:
    """The eye, and the reader that hears it."""
    nodes = {"eye": EYE, "reader": {"model": READER, "hears": ["eye"], "at": at}}
    output = {"layout": "answered", "choices": 4, "width": 128}
    return graphs.GraphConfig.of({"nodes": nodes, "latent": {"width": 256}, "output": output})


def head_config(parameters: int, widths: dict[str, int]) -> graphs.GraphConfig:
    """A perceptron on both nodes' states, with at least so many trained values."""
    width = graphs.matched_width(parameters, sum(widths.values()), 1)
    output = {"readout": "head", "layout": "answered", "choices": 4, "width": width}
    return graphs.GraphConfig.of(
        {"nodes": {"eye": EYE, "reader": {"model": READER}}, "output": output}
    )


def build(
    config: graphs.GraphConfig, eye: ViTModel, seed: int, reader: Any = None
) -> graphs.LatentGraph:
    """Builds a graph around an eye."""
    models = {"eye": eye} | ({} if reader is None else {"reader": reader})
    return graphs.build(config, models, seed=seed, dtype={"reader": "float32"})


def questions(pictures: Pictures, seed: int) -> tuple[list[graphs.Question], list[dict[str, Any]]]:
    """Returns a question for each picture, and what the eye is shown of it."""
    found = []
    for number, (colour, shape) in enumerate(pictures.labels.tolist()):
        drawn = random.Random(f"{seed}:{number}:{colour}:{shape}")
        other = drawn.choice([one for one in range(len(COLOURS)) if one != colour])
        form = drawn.choice([one for one in range(len(SHAPES)) if one != shape])
        choices = [(colour, shape), (colour, form), (other, shape), (other, form)]
        drawn.shuffle(choices)
        label = choices.index((colour, shape))
        found.append(graphs.Question(ASKED, tuple(caption(*one) for one in choices), label))
    return found, [{"pixel_values": pixels[None]} for pixels in pictures.pixels]


def asked(config: graphs.GraphConfig, pictures: Pictures, seed: int) -> list[graphs.Asked]:
    """Returns the questions as a graph reads them."""
    texts, shown = questions(pictures, seed)
    return graphs.ask(config, texts, shown={"eye": shown})


def exchanged(part: Sequence[graphs.Asked]) -> list[graphs.Asked]:
    """Every question with the picture of the one that follows."""
    following = [*part[1:], part[0]]
    return [
        replace(one, texts={**one.texts, "eye": other.texts["eye"]})
        for one, other in zip(part, following, strict=True)
    ]


def run(
    config: graphs.GraphConfig, eye: ViTModel, parts: Splits, seed: int, keep: Path, **settings: Any
) -> dict[str, Any]:
    """Trains a graph and answers both test parts, with the right pictures, exchanged ones, and none."""
    graph = build(config, eye, seed, settings.pop("reader", None))
    train, validation = (asked(config, part, seed) for part in (parts.train, parts.validation))
    done = graphs.train(
        graph,
        train,
        config=replace(CONFIG, seed=seed, **settings),
        validation=validation,
        keep=keep,
        progress=False,
    )
    found: dict[str, Any] = {"parameters": done.trained_parameters, "best_step": done.best_step}
    found["validation_loss"] = min(one["eval_loss"] for one in done.evaluations)
    for name, pictures in (("seen", parts.test), ("unseen", parts.unseen)):
        test = asked(config, pictures, seed)
        kept = graphs.Kept(graph, keep, progress=False)
        kept.complete(
            {node: [one for each in test for one in each.texts[node]] for node in graph.nodes}
        )
        options: dict[str, Any] = {"run_of": graphs.Replay(graph, kept).of, "batch_size": 32}
        ways = {"": (test, []), "_shuffled": (exchanged(test), []), "_reader": (test, ["eye"])}
        for way, (part, without) in ways.items():
            choices = graphs.choose(graph, part, without=without, **options)
            right = [one.place == each.label for one, each in zip(choices, part, strict=True)]
            found[name + way] = [int(one) for one in right]
    return found | {"history": done.history}


def searched(
    config: graphs.GraphConfig, eye: ViTModel, parts: Splits, seed: int, first: Path
) -> dict[str, Any]:
    """Runs a method at the rate that the first seed chose on validation; the first seed tries all."""
    if seed != FIRST and not first.exists():
        raise SystemExit(f"seed {FIRST} chooses the learning rates; run it first")
    rates = RATES if seed == FIRST else (json.loads(first.read_text())["learning_rate"],)
    with tempfile.TemporaryDirectory() as keep:
        tried = {
            rate: run(config, eye, parts, seed, Path(keep), learning_rate=rate) for rate in rates
        }
    losses = {rate: found["validation_loss"] for rate, found in tried.items()}
    best = min(losses, key=losses.__getitem__)
    return {**tried[best], "learning_rate": best, "search": {str(k): v for k, v in losses.items()}}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the seeds that are missing, and prints the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for seed in sorted(options.seeds):
        cells = {name: options.output / f"{name}-{seed}.json" for name in ("graph", "head")}
        if all(cell.exists() for cell in cells.values()):
            continue
        parts = splits(seed, COUNTS)
        eye = trained_eye(parts.eye, seed)
        plain = build(graph_config(), eye, seed)
        configs = {
            "graph": graph_config(),
            "head": head_config(plain.num_trainable(), plain.widths),
        }
        for name, config in configs.items():
            if cells[name].exists():
                continue
            found = searched(config, eye, parts, seed, options.output / f"{name}-{FIRST}.json")
            write(cells[name], {"method": name, **found, "provenance": provenance(seed)})
            print(name, seed, {way: sum(found[way]) for way in ("seen", "unseen")}, flush=True)
    print(table(options.output))
    print(json.dumps({"results": str(options.output)}))


def table(output: Path) -> str:
    """Returns right answers of all seeds together, with Wilson intervals."""
    lines = ["| | seen | unseen |", "|---|---|---|"]
    for name in ("graph", "head"):
        cells = [json.loads(one.read_text()) for one in sorted(output.glob(f"{name}-*.json"))]
        for way in ("", "_shuffled", "_reader"):
            if not cells or (name == "head" and way):
                continue
            shown = []
            for part in ("seen", "unseen"):
                right = [one for cell in cells for one in cell[part + way]]
                share = wilson(sum(right), len(right))
                shown.append(
                    f"{sum(right)} of {len(right)}, {sum(right) / len(right):.1%} ({share.low:.1%} to {share.high:.1%})"
                )
            lines.append(f"| {name}{way} | {shown[0]} | {shown[1]} |")
    return "\n".join([*lines, *_difference(output)])


def _difference(output: Path) -> list[str]:
    """Returns the row of graph minus head, in points, paired by picture over the seeds that both have."""
    found = {
        name: {one.stem.rpartition("-")[2]: json.loads(one.read_text()) for one in cells}
        for name in ("graph", "head")
        if (cells := sorted(output.glob(f"{name}-*.json")))
    }
    seeds = sorted(found.get("graph", {}).keys() & found.get("head", {}).keys())
    if not seeds:
        return []
    shown = []
    for part in ("seen", "unseen"):
        ours, others = ([found[name][seed][part] for seed in seeds] for name in ("graph", "head"))
        gap = paired(ours, others)
        shown.append(f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})")
    return [f"| graph minus head, points | {shown[0]} | {shown[1]} |"]


if __name__ == "__main__":
    main()
