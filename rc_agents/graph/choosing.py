"""Answers of a graph: choices with calibrated probabilities, and the temperature that calibrates them.

Temperature scaling: Guo et al., On Calibration of Modern Neural Networks, 2017. Shapes: B questions, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import ConfigError, InputError
from ..questions import Question
from .asking import Asked, OneRun, answer, ask
from .model import LatentGraph


@dataclass(frozen=True)
class Choice:
    """An answer.

    Attributes:
        place: of the choice, counted from 0.
        text: of the choice; None where the question was not given as a `Question`.
        probabilities: of all choices, calibrated where the graph is.
        routing: by node that the output reads, how much it was listened to.
        lost: nodes in other processes that could not be reached, without which this was answered.
    """

    place: int
    text: str | None
    probabilities: tuple[float, ...]
    routing: dict[str, float]
    lost: tuple[str, ...] = ()


@torch.inference_mode()
def choose(
    graph: LatentGraph,
    questions: Sequence[Question | Asked],
    *,
    batch_size: int = 16,
    run_of: OneRun | None = None,
    without: Sequence[str] = (),
) -> list[Choice]:
    """Answers questions.

    Args:
        graph: that chooses.
        questions: not empty.
        batch_size: questions a pass.
        run_of: where states come from; the models themselves where left out.
        without: nodes that show nothing.

    Raises:
        ConfigError: the graph speaks instead of choosing.
        InputError: no question.
    """
    if graph.config.voice is not None:
        raise ConfigError("this graph speaks instead of choosing; use generate(...)")
    if not questions:
        raise InputError("no questions; pass at least one")
    found: list[Choice] = []
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        asked = ask(graph.config, part)
        scores_BK, output = answer(graph, asked, run_of, without)
        likely_BK = (scores_BK.float() / graph.temperature).softmax(-1)
        routing_RN = output.routing.mean((1, 2))
        places = [0]
        for one in asked:
            places.append(places[-1] + (len(next(iter(one.texts.values())))))
        for row, (given, one) in enumerate(zip(part, asked, strict=True)):
            likely = tuple(likely_BK[row, : one.num_choices].tolist())
            place = max(range(len(likely)), key=likely.__getitem__)
            mean_N = routing_RN[places[row] : places[row + 1]].mean(0).tolist()
            text = given.choices[place] if isinstance(given, Question) else None
            routing = dict(zip(graph.config.read, mean_N, strict=True))
            lost = tuple(sorted(output.signals.lost))
            found.append(Choice(place, text, likely, routing, lost))
    return found


def calibrate(
    graph: LatentGraph,
    questions: Sequence[Question | Asked],
    *,
    batch_size: int = 16,
    run_of: OneRun | None = None,
) -> float:
    """Finds the temperature of the least cross-entropy on questions that the graph was not trained on, and sets it.

    Notes the output's routing on them too, which `drawing.draw` shows.

    Args:
        graph: that chooses.
        questions: for validation.
        batch_size: questions a pass.
        run_of: as in `choose`.

    Returns:
        The temperature.
    """
    asked = ask(graph.config, questions)
    scores: list[Tensor] = []
    routing: list[Tensor] = []
    with torch.no_grad(), graph.complete():
        for start in range(0, len(asked), batch_size):
            scores_BK, output = answer(graph, asked[start : start + batch_size], run_of)
            scores += scores_BK.cpu().float()
            routing += output.routing.mean((1, 2)).cpu()
    shares = torch.stack(routing).mean(0).tolist()
    graph.routing = dict(zip(graph.config.read, shares, strict=True))
    scores_BK = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True, padding_value=-torch.inf)
    labels_B = torch.tensor([one.label for one in asked])
    graph.temperature = best_temperature(scores_BK, labels_B)
    return graph.temperature


def best_temperature(scores_BK: Tensor, labels_B: Tensor) -> float:
    """Returns the temperature between 1/20 and 20 of the least cross-entropy, by golden section on its logarithm."""
    low, high = -3.0, 3.0
    share = (5**0.5 - 1) / 2

    def loss(log: float) -> float:
        return float(cross_entropy(scores_BK / torch.tensor(log).exp(), labels_B))

    for _ in range(40):
        first, second = high - share * (high - low), low + share * (high - low)
        if loss(first) < loss(second):
            high = second
        else:
            low = first
    return float(torch.tensor((low + high) / 2).exp())


def calibration_error(choices: Sequence[Choice], labels: Sequence[int], bins: int = 10) -> float:
    """Returns the expected calibration error: the mean gap between confidence and accuracy over equal bins.

    Raises:
        InputError: unequal counts, or none.
    """
    if not choices or len(choices) != len(labels):
        raise InputError(f"as many labels as choices, got {len(labels)} and {len(choices)}")
    sure = torch.tensor([max(one.probabilities) for one in choices])
    right = torch.tensor(
        [float(one.place == label) for one, label in zip(choices, labels, strict=True)]
    )
    places = (sure * bins).long().clamp(max=bins - 1)
    gaps = [
        float((sure[places == place].mean() - right[places == place].mean()).abs())
        * float((places == place).float().mean())
        for place in places.unique().tolist()
    ]
    return sum(gaps)
