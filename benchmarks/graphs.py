"""Graphs of frozen models against what a sceptic would run beside them: `python -m rc_agents.benchmarks.graphs`.

Multiple choice, one text a question with its choices by letter. Level one: SmolLM2-135M and two specialists of it;
level two: SmolLM2-135M and, where its package is installed, Gemma-3-270M. What never changes is computed once and kept.
One JSON a task, method and seed; learning rates are chosen on validation with the first seed, for all graphs together.

    frozen members  the likeliest letter behind "Answer:", and the mean of all members' probabilities
    heads           a perceptron on one frozen model's state with as many trained values as the graph, and one on the
                    states of all models together
    graphs          as published (mean), attention-weighted, with a ridge start, bridges without a latent space
    controls        level one reads another question; level one of random weights (one model, read behind three blocks)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.files import read, write
from rc_agents.benchmarks.statistics import hierarchical, paired, wilson

from rc_agents import graph as graphs
from rc_agents import packaged, questions
from rc_agents.provenance import provenance

BASE, GEMMA = "package:smollm2-135m", "package:gemma3-270m"
MODELS: dict[str, dict[str, str]] = {
    "general": {"base": BASE},
    "medical": {"base": BASE, "adapter": "package:medical-coding"},
    "python": {"base": BASE, "adapter": "package:python"},
    "gemma": {"base": GEMMA},
}
LEVEL_ONE = ("general", "medical", "python")
RATES = (1e-3, 3e-3)
TASKS: dict[str, dict[str, Any]] = {
    "arc_challenge": {"train": None, "validation": 200},
    "openbookqa": {"train": 800, "validation": 200},
    "mmlu": {"train": 800, "validation": 200},
}
CONFIG = graphs.GraphTrainConfig(
    steps=90, batch_size=32, weight_decay=0.01, eval_steps=15, gate_learning_rate=1e-2
)
LATENT, OUTPUT = 256, 128
RESULTS = Path("benchmarks/results/graph")


@dataclass(frozen=True)
class Method:
    """A graph, and how it is trained.

    Args:
        config: the graph.
        ridge: whether it starts in closed form.
        shuffled: whether level one reads another question.
        random: whether level one's models have random weights.
        dissected: whether it is also asked without each node, with the first seed.
    """

    config: graphs.GraphConfig
    ridge: bool = False
    shuffled: bool = False
    random: bool = False
    dissected: bool = False


def graph_config(
    level_two: Sequence[str], choices: int, *, aggregate: str = "mean", link: str = "latent"
) -> graphs.GraphConfig:
    """Returns the graph: all nodes are read at their last block, level two hears after two thirds of its blocks."""
    nodes = {name: graphs.NodeConfig(model=MODELS[name]) for name in LEVEL_ONE}
    for name in level_two:
        judge = "judge" if name == "general" else name
        at = 20 if name == "general" else 12
        nodes[judge] = graphs.NodeConfig(model=MODELS[name], hears=LEVEL_ONE, at=at)
    return graphs.GraphConfig(
        nodes=nodes,
        latent=graphs.LatentConfig(width=LATENT, aggregate=aggregate, link=link),
        output=graphs.OutputConfig(width=OUTPUT, choices=choices),
    )


def random_config(plain: graphs.GraphConfig) -> graphs.GraphConfig:
    """Returns the graph with a model of random weights in the place of level one's, read behind three blocks."""
    drawn = {
        name: graphs.NodeConfig(layer=layer)
        for name, layer in zip(LEVEL_ONE, (10, 15, 20), strict=True)
    }
    return replace(plain, nodes={**plain.nodes, **drawn})


def head_config(
    read: dict[str, int | float], parameters: int, choices: int, widths: dict[str, int]
) -> graphs.GraphConfig:
    """Returns a head with at least so many trained values on models read behind some block."""
    from rc_agents.graph.output import matched_width

    width = matched_width(parameters, sum(widths[name] for name in read), choices)
    return graphs.GraphConfig(
        nodes={
            name: graphs.NodeConfig(model=MODELS[name], layer=layer) for name, layer in read.items()
        },
        output=graphs.OutputConfig(readout="head", width=width, choices=choices),
    )


def methods(level_two: Sequence[str], choices: int, widths: dict[str, int]) -> dict[str, Method]:
    """Returns all trained methods by name."""
    plain = graph_config(level_two, choices)
    matched = graphs.build(plain, dtype="float32").num_trainable()
    found = {
        "graph": Method(plain, dissected=True),
        "graph_attention": Method(graph_config(level_two, choices, aggregate="attention")),
        "graph_ridge": Method(graph_config(level_two, choices), ridge=True),
        "bridges": Method(graph_config(level_two, choices, link="direct")),
        "graph_shuffled": Method(plain, shuffled=True),
        "graph_random": Method(random_config(plain), random=True),
    }
    members = [*LEVEL_ONE, *(name for name in level_two if name not in LEVEL_ONE)]
    for name in members:
        found[f"head_{name}"] = Method(head_config({name: 1.0}, matched, choices, widths))
    for name in level_two:  # read where they hear
        middle = {"gemma": 12}.get(name, 20)
        found[f"head_{name}_middle"] = Method(head_config({name: middle}, matched, choices, widths))
    reads: dict[str, int | float] = dict.fromkeys(members, 1.0)
    found["head_all"] = Method(head_config(reads, matched, choices, widths))
    return found


@dataclass
class Bench:
    """Data and states of one task.

    Args:
        task: its name.
        keep: folder of kept states.
    """

    task: str
    keep: Path

    def __post_init__(self) -> None:
        self.data = questions.load(self.task, **TASKS[self.task])
        every = [*self.data.train, *self.data.validation, *self.data.test]
        self.choices = max(len(one.choices) for one in every)

    def parts(self, method: Method) -> list[list[graphs.Asked]]:
        """Returns train, validation and test as a method reads them."""
        found = [
            graphs.ask(method.config, part)
            for part in (self.data.train, self.data.validation, self.data.test)
        ]
        return [_shuffled(part) for part in found] if method.shuffled else found

    def replay(self, graph: graphs.LatentGraph) -> Callable[..., Any]:
        """Completes the states that are missing; returns where a graph's states come from."""
        kept = graphs.Kept(graph, self.keep)
        taught = [*self.data.train, *self.data.validation]
        for part in (taught, self.data.test):
            texts = {
                name: [text for one in graphs.ask(graph.config, part) for text in one.texts[name]]
                for name in graph.nodes
            }
            kept.complete(texts)
        return graphs.Replay(graph, kept).of


def _shuffled(part: Sequence[graphs.Asked]) -> list[graphs.Asked]:
    """Level one reads the question that follows; labels stay."""
    following = [*part[1:], part[0]]
    return [
        replace(
            one,
            texts={name: (other if name in LEVEL_ONE else one).texts[name] for name in one.texts},
        )
        for one, other in zip(part, following, strict=True)
    ]


def build(method: Method, seed: int) -> graphs.LatentGraph:
    """Builds a method's graph."""
    if not method.random:
        return graphs.build(method.config, dtype="float32", seed=seed)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = packaged.resolve(BASE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(place)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return graphs.build(
        method.config,
        dict.fromkeys(LEVEL_ONE, model),
        tokenizers=dict.fromkeys(LEVEL_ONE, AutoTokenizer.from_pretrained(place)),
        seed=seed,
        dtype=dict.fromkeys((n for n in method.config.nodes if n not in LEVEL_ONE), "float32"),
    )


def run(bench: Bench, method: Method, seed: int, rate: float) -> dict[str, Any]:
    """Trains a method and answers the test questions."""
    graph = build(method, seed)
    run_of = bench.replay(graph)
    train, validation, test = bench.parts(method)
    started = time.process_time()
    begun = None
    if method.ridge:
        begun = asdict(graphs.ridge_start(graph, train, run_of=run_of))
    config = replace(CONFIG, learning_rate=rate, seed=seed)
    result = graphs.train(
        graph, train, config=config, validation=validation, keep=bench.keep, progress=False
    )
    temperature = graphs.calibrate(graph, validation, run_of=run_of)
    report = graphs.report(
        graph, test, run_of=run_of, batch_size=32, leave_one_out=method.dissected and not seed
    )
    return {
        "parameters": result.trained_parameters,
        "steps": result.steps,
        "best_step": result.best_step,
        "validation_loss": min(one["eval_loss"] for one in result.evaluations),
        "ridge": begun,
        "temperature": temperature,
        "history": result.history,
        "cpu_seconds": round(time.process_time() - started, 1),
        **report.to_dict(),
    }


def letters(bench: Bench, name: str) -> list[list[float]]:
    """Returns the probabilities of the letters behind "Answer:" that a frozen member gives test questions."""
    config = graphs.GraphConfig(
        nodes={name: graphs.NodeConfig(model=MODELS[name])},
        output=graphs.OutputConfig(readout="head", width=1, choices=bench.choices),
    )
    graph = graphs.build(config, dtype="float32")
    asked = graphs.ask(config, bench.data.test)
    return graphs.letter_probabilities(
        graph, name, asked, run_of=bench.replay(graph), batch_size=32
    )


def frozen(bench: Bench, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the cells of the frozen members and of their mean."""
    each = {name: letters(bench, name) for name in names}
    each["mean"] = [
        [statistics.mean(values) for values in zip(*rows, strict=True)]
        for rows in zip(*each.values(), strict=True)
    ]
    labels = [one.label for one in bench.data.test]
    return {
        f"frozen_{name}": {
            "right": [
                max(range(len(row)), key=row.__getitem__) == label
                for row, label in zip(rows, labels, strict=True)
            ],
            "count": len(rows),
            "parameters": 0,
        }
        for name, rows in each.items()
    }


def cell(output: Path, task: str, method: str, seed: int) -> Path:
    """Returns where a cell's JSON lies."""
    return output / task / f"{method}-{seed}.json"


def put(output: Path, task: str, method: str, seed: int, found: dict[str, Any]) -> None:
    """Writes a cell, and says so."""
    hits, count = sum(found["right"]), found["count"]
    interval = wilson(hits, count)
    record = {
        "task": task,
        "method": method,
        **found,
        "right": [int(one) for one in found["right"]],
        "accuracy": hits / count,
        "interval": [interval.low, interval.high],
        "provenance": provenance(seed),
    }
    write(cell(output, task, method, seed), record)
    print(f"{task} {method} {seed}: {hits} of {count}, {hits / count:.1%}", flush=True)


def run_all(
    task: str, names: Sequence[str], seeds: Sequence[int], output: Path, keep: Path
) -> None:
    """Runs the cells of a task that are missing."""
    bench = Bench(task, keep)
    level_two = ["general", *(["gemma"] if has_gemma() else [])]
    widths = {name: 640 if name == "gemma" else 576 for name in MODELS}
    every = methods(level_two, bench.choices, widths)
    members = [*LEVEL_ONE, *level_two[1:]]
    if not cell(output, task, "frozen_mean", 0).exists() and (not names or "frozen" in names):
        for method, found in frozen(bench, members).items():
            put(output, task, method, 0, found)
    for seed in seeds:
        for method in [name for name in names if name != "frozen"] or (() if names else every):
            if not cell(output, task, method, seed).exists():
                rate, searched = _rate(bench, every[method], seed, output, task, method)
                found = searched.pop(rate, None) or run(bench, every[method], seed, rate)
                put(output, task, method, seed, found | {"learning_rate": rate})


def _rate(
    bench: Bench, method: Method, seed: int, output: Path, task: str, name: str
) -> tuple[float, dict[float, Any]]:
    """Returns the rate chosen on validation with the first seed, and runs that the choice has made already."""
    known = cell(output, task, name if name.startswith("head") else "graph", 0)
    if known.exists():
        return read(known)["learning_rate"], {}
    tried = {rate: run(bench, method, 0, rate) for rate in RATES}
    best = min(tried, key=lambda rate: tried[rate]["validation_loss"])
    for found in tried.values():
        found["search"] = {str(rate): one["validation_loss"] for rate, one in tried.items()}
    return best, tried if not seed else {}


def has_gemma() -> bool:
    """Whether the optional package is installed."""
    try:
        packaged.resolve(GEMMA)
    except ValueError:
        return False
    return True


def table(output: Path) -> str:
    """Returns the results as Markdown: mean accuracy over seeds, and differences paired by question."""
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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs tasks, or reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tasks", nargs="+", default=["arc_challenge", "openbookqa"], choices=TASKS
    )
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, default=Path("~/.cache/rc_agents/graph").expanduser())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print the table of what is there")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    if not asked.report:
        for task in asked.tasks:
            run_all(task, asked.methods, asked.seeds, asked.output, asked.keep)
    if not asked.output.is_dir():
        sys.exit(f"no results in {asked.output}")
    print(table(asked.output))
    print(json.dumps({"results": str(asked.output)}))


if __name__ == "__main__":
    main()
