"""Graphs of frozen models against what a sceptic would run beside them: `python -m rc_agents.benchmarks.graphs`.

Multiple choice: one text a question with its choices by letter, or (`..._answered`) one text a choice with that choice
as its answer. Level one: SmolLM2-135M and two specialists of it; level two: SmolLM2-135M and, where its package is
installed, Gemma-3-270M. What never changes is computed once and kept. One JSON a task, method and seed; learning rates
are chosen on validation with the first seed, for all graphs together.

    frozen members  the likeliest letter or answer, and the mean of all members' probabilities
    heads           a perceptron on one frozen model's state with as many trained values as the graph, and one on the
                    states of all models together
    graphs          as published (mean), attention-weighted, with a ridge start, bridges without a latent space
    controls        level one reads another question; level one of random weights (one model, read behind three blocks)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.files import read, write
from rc_agents.benchmarks.graph_members import frozen
from rc_agents.benchmarks.graph_methods import GEMMA, LEVEL_ONE, Method, build, methods
from rc_agents.benchmarks.graph_table import table
from rc_agents.benchmarks.statistics import wilson

from rc_agents import graph as graphs
from rc_agents import packaged, questions
from rc_agents.provenance import provenance

RATES = (1e-3, 3e-3)
CONFIG = graphs.GraphTrainConfig(
    steps=90, batch_size=32, weight_decay=0.01, eval_steps=15, gate_learning_rate=1e-2
)
RESULTS = Path("benchmarks/results/graph")


@dataclass(frozen=True)
class Task:
    """A data set, and how its questions are written.

    Args:
        data: its name in `rc_agents.questions`.
        layout: of the questions.
        train: training questions; None for all.
        validation: questions to choose by.
    """

    data: str
    layout: str = "lettered"
    train: int | None = 800
    validation: int = 200


TASKS = {
    "arc_challenge": Task("arc_challenge", train=None),
    "openbookqa": Task("openbookqa"),
    "mmlu": Task("mmlu"),
    "arc_challenge_answered": Task("arc_challenge", "answered", train=None),
    "openbookqa_answered": Task("openbookqa", "answered", train=2000),
}


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
        task = TASKS[self.task]
        self.data = questions.load(task.data, train=task.train, validation=task.validation)
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
    layout = TASKS[task].layout
    level_two = ["general", *(["gemma"] if has_gemma() else [])]
    every = methods(level_two, bench.choices, layout)
    members = [*LEVEL_ONE, *level_two[1:]]
    if not cell(output, task, "frozen_mean", 0).exists() and (not names or "frozen" in names):
        cells = frozen(bench.data.test, members, bench.choices, layout, bench.replay)
        for method, found in cells.items():
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
