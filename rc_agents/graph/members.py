"""What a frozen member of a graph would answer by itself: the letter, or the answer, it finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..backbone import Lens, num_blocks
from ..errors import ConfigError, nearest
from ..questions import LETTERS, Question, unanswered
from ..scoring import CausalScorer
from .asking import Asked, OneRun
from .model import LatentGraph
from .signals import WholeRun


@torch.inference_mode()
def letter_probabilities(
    graph: LatentGraph,
    name: str,
    asked: Sequence[Asked],
    *,
    run_of: OneRun | None = None,
    batch_size: int = 16,
) -> list[list[float]]:
    """Returns the probability that a node's model gives each choice's letter, among the letters of the question.

    Args:
        graph: with the node, which hears nobody and is read at the last token of its last block.
        name: of the node.
        asked: questions with their choices by letter.
        run_of: where states come from; the model itself where left out.
        batch_size: questions a pass.

    Raises:
        ConfigError: the node is read elsewhere, or hears others.
    """
    _check_here(graph, name)
    node: Any = graph.nodes[name]
    if node.node.hears or node.layer != num_blocks(node.model) or node.node.pooling != "last":
        raise ConfigError(
            f"node {name!r} says letters only where it hears nobody and is read at its last block and token"
        )
    lens, tokenizer = Lens(node.model), graph.members[name].tokenizer
    ids = [tokenizer(f" {letter}", add_special_tokens=False).input_ids[-1] for letter in LETTERS]
    found = []
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        texts = {each: [one.texts[each][0] for one in part] for each in graph.nodes}
        run = run_of(texts) if run_of is not None else None
        run = run or WholeRun(graph.nodes, graph.read_texts(texts))
        logits_BV = lens(run.states(name, None)[0][:, -1]).float()
        for row, one in zip(logits_BV, part, strict=True):
            found.append(row[ids[: one.num_choices]].softmax(-1).tolist())
    return found


def answer_probabilities(
    graph: LatentGraph, name: str, questions: Sequence[Question], *, batch_size: int = 16
) -> list[list[float]]:
    """Returns the softmax over choices of the mean log-probability a token that a node's model gives each answer.

    Args:
        graph: with the node.
        name: of the node; what it hears has no part in this.
        questions: written with one text a choice.
        batch_size: texts a pass.
    """
    _check_here(graph, name)
    member = graph.members[name]
    scorer = CausalScorer(member.model, member.tokenizer, batch_size=batch_size)
    pairs = [(unanswered(one), f" {choice}") for one in questions for choice in one.choices]
    rows = iter(scorer.loglikelihood(pairs))
    found = []
    for one in questions:
        scored = [next(rows) for _ in one.choices]
        means_K = torch.tensor([row.logprob / row.num_tokens for row in scored])
        found.append(means_K.softmax(-1).tolist())
    return found


def _check_here(graph: LatentGraph, name: str) -> None:
    if name not in graph.members:
        raise ConfigError(
            f"node {name!r} has no model in this process; {nearest(name, list(graph.members))}"
        )
