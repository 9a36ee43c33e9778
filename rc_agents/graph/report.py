"""What a trained graph does with questions: accuracy, calibration, routing, and what each node is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..questions import Question
from .asking import Asked, OneRun, ask
from .choosing import Choice, calibration_error, choose
from .model import LatentGraph


@dataclass(frozen=True)
class Report:
    """How a graph answered.

    Attributes:
        count: questions.
        right: by question, whether it was answered rightly.
        calibration: expected calibration error of its probabilities.
        routing: by node that the output reads, how much it was listened to, in the mean.
        routing_by_choice: the same by the place of the choice that was given.
        without: by node, the accuracy with that node silent; empty unless asked for.
        lost: nodes in other processes without which some question was answered.
    """

    count: int
    right: list[bool]
    calibration: float
    routing: dict[str, float]
    routing_by_choice: dict[int, dict[str, float]]
    without: dict[str, float] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(self.right) / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's 95 % interval (Wilson, 1927)."""
        z, n, share = 1.959963984540054, self.count, self.accuracy
        middle = share + z * z / (2 * n)
        width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return {"accuracy": self.accuracy} | vars(self)


def report(
    graph: LatentGraph,
    questions: Sequence[Question | Asked],
    *,
    run_of: OneRun | None = None,
    batch_size: int = 16,
    leave_one_out: bool = False,
) -> Report:
    """Answers questions and sums up.

    Args:
        graph: that chooses.
        questions: with their labels.
        run_of: where states come from; the models themselves where left out.
        batch_size: questions a pass.
        leave_one_out: also answer them once without each node.
    """
    asked = ask(graph.config, questions)
    options: dict[str, Any] = {"run_of": run_of, "batch_size": batch_size}
    choices = choose(graph, asked, **options)
    labels = [one.label for one in asked]
    without = {}
    if leave_one_out:
        for name in graph.config.nodes:
            found = choose(graph, asked, without=[name], **options)
            without[name] = sum(_right(found, labels)) / len(labels)
    places = sorted({one.place for one in choices})
    return Report(
        count=len(asked),
        right=_right(choices, labels),
        calibration=calibration_error(choices, labels),
        routing=_mean(choices),
        routing_by_choice={
            place: _mean([one for one in choices if one.place == place]) for place in places
        },
        without=without,
        lost=tuple(sorted({name for one in choices for name in one.lost})),
    )


def _right(choices: Sequence[Choice], labels: Sequence[int]) -> list[bool]:
    return [one.place == label for one, label in zip(choices, labels, strict=True)]


def _mean(choices: Sequence[Choice]) -> dict[str, float]:
    names = choices[0].routing
    return {name: sum(one.routing[name] for one in choices) / len(choices) for name in names}
