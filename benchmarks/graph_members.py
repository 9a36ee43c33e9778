"""What the frozen members of a graph answer by themselves, and what the mean of their probabilities does."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rc_agents.benchmarks.graph_methods import MODELS

from rc_agents import graph as graphs

Probabilities = list[list[float]]


def frozen(
    test: Sequence[graphs.Question],
    names: Sequence[str],
    choices: int,
    layout: str,
    replay: Callable[[graphs.LatentGraph], Any],
) -> dict[str, dict[str, Any]]:
    """Returns the cells of the frozen members and of their mean.

    Args:
        test: the questions.
        names: of the members.
        choices: the most that a question has.
        layout: `lettered`, the likeliest letter; `answered`, the answer of the highest mean log-probability a token.
        replay: graph -> where its states come from.
    """
    each = {name: _alone(name, test, choices, layout, replay) for name in names}
    each["mean"] = [
        [statistics.mean(values) for values in zip(*rows, strict=True)]
        for rows in zip(*each.values(), strict=True)
    ]
    return {f"frozen_{name}": _cell(test, rows) for name, rows in each.items()}


def _alone(
    name: str, test: Sequence[graphs.Question], choices: int, layout: str, replay: Any
) -> Probabilities:
    config = graphs.GraphConfig(
        nodes={name: graphs.NodeConfig(model=MODELS[name])},
        output=graphs.OutputConfig(readout="head", width=1, choices=choices, layout=layout),
    )
    graph = graphs.build(config, dtype="float32")
    if layout == "answered":
        return graphs.answer_probabilities(graph, name, test, batch_size=32)
    asked = graphs.ask(config, test)
    return graphs.letter_probabilities(graph, name, asked, run_of=replay(graph), batch_size=32)


def _cell(test: Sequence[graphs.Question], rows: Probabilities) -> dict[str, Any]:
    right = [
        max(range(len(row)), key=row.__getitem__) == one.label
        for row, one in zip(rows, test, strict=True)
    ]
    return {"right": right, "count": len(rows), "parameters": 0}
