"""Questions as a graph reads them, and its scores of their choices.

Shapes: B questions, R texts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, nearest
from ..questions import Question, answered, lettered
from .config import GraphConfig
from .model import LatentGraph
from .reading import Read, Shown
from .settings import OutputConfig
from .signals import GraphOutput, Run

OneRun = Callable[[dict[str, list[Read]]], Run | None]
"""Texts by node -> where their states come from; None for the models themselves."""


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        texts: by node, one text, or one for each choice; of an encoder, what it is shown.
        num_choices: K.
        label: the right one's place.
    """

    texts: Mapping[str, tuple[Read, ...]]
    num_choices: int
    label: int

    @classmethod
    def by_node(cls, texts: Mapping[str, Read], num_choices: int, label: int) -> Asked:
        """Every node reads a text of its own."""
        return cls({name: (text,) for name, text in texts.items()}, num_choices, label)


def ask(
    config: GraphConfig,
    questions: Iterable[Question | Asked],
    *,
    shown: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> list[Asked]:
    """Returns questions as the graph's layout writes them, the same for every node that reads text.

    Args:
        config: of the graph.
        questions: to ask.
        shown: by node that is an encoder, its inputs of one row for each question.

    Raises:
        DataError: a question with more choices than the output scores, or more or less shown than asked.
        ConfigError: something is shown to an unknown node.
    """
    output, questions = config.output, list(questions)
    pictures = _each_shown(config, shown or {}, len(questions))
    found = []
    for place, one in enumerate(questions):
        if isinstance(one, Question):
            one = _written(output, list(config.nodes), one, pictures[place])
        elif shown:
            raise DataError("shown goes with a Question; an Asked says itself what its nodes read")
        if output.layout == "lettered" and one.num_choices > output.choices:
            raise DataError(
                f"a question has {one.num_choices} choices and the output scores {output.choices}; build the graph "
                f"with output choices={one.num_choices}"
            )
        found.append(one)
    return found


def _each_shown(
    config: GraphConfig, shown: Mapping[str, Sequence[Mapping[str, Any]]], count: int
) -> list[dict[str, Shown]]:
    """Returns what encoders are shown, question by question."""
    for name, each in shown.items():
        if name not in config.nodes:
            raise ConfigError(
                f"shown names an unknown node {name!r}; {nearest(name, config.nodes)}"
            )
        if len(each) != count:
            raise DataError(f"node {name!r} is shown {len(each)} inputs for {count} questions")
    return [{name: Shown(each[place]) for name, each in shown.items()} for place in range(count)]


def _written(
    output: OutputConfig, names: Sequence[str], question: Question, shown: Mapping[str, Shown]
) -> Asked:
    each = answered(question) if output.layout == "answered" else [lettered(question)]
    texts: dict[str, tuple[Read, ...]] = dict.fromkeys(names, tuple(each))
    texts |= {name: (one,) * len(each) for name, one in shown.items()}
    return Asked(texts, len(question.choices), question.label)


def texts_by_node(asked: Sequence[Asked]) -> dict[str, list[Read]]:
    """Returns all texts of some questions, in order."""
    return {name: [text for one in asked for text in one.texts[name]] for name in asked[0].texts}


def answer(
    graph: LatentGraph,
    asked: Sequence[Asked],
    run_of: OneRun | None = None,
    without: Sequence[str] = (),
) -> tuple[Tensor, GraphOutput]:
    """Scores the choices of some questions.

    Args:
        graph: that chooses.
        asked: not empty.
        run_of: where states come from; the models themselves where left out.
        without: nodes that show nothing.

    Returns:
        Scores (B, K), -inf where a question has fewer choices, and what the graph gave.
    """
    texts = texts_by_node(asked)
    run = run_of(texts) if run_of is not None else None
    batches = graph.read_texts(texts) if run is None else None
    output: GraphOutput = graph(batches, run=run, without=without)
    counts = torch.tensor([one.num_choices for one in asked], device=output.logits.device)
    if graph.config.output.layout == "lettered":
        scores_BK = output.logits
        real = torch.arange(scores_BK.shape[1], device=counts.device)[None] < counts[:, None]
        return scores_BK.masked_fill(~real, -torch.inf), output
    parts = output.logits[:, 0].split(counts.tolist())
    padded = torch.nn.utils.rnn.pad_sequence(
        list(parts), batch_first=True, padding_value=-torch.inf
    )
    return padded, output
