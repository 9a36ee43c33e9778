"""Knowledge transfer: does an ensemble know what only its specialist was taught, and is it the anchor elsewhere?

Scores of one method in one setting and seed, every one with its per-item outcomes:
`exact`: the greedy answer's first line is right, on held-out facts in templates nobody was trained on;
`choice`: the right answer among ten has the highest log-probability (chance 10 %);
`strangers`: subjects nobody was taught, where the method should answer as the frozen anchor does;
`general`: loss on general text that no training set holds;
`own`: greedy answers to questions of the anchor's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rc_agents.benchmarks.facts import Fact, World
from rc_agents.benchmarks.settings import Sizes
from rc_agents.benchmarks.tasks.items import Item, ask, documents, first_line, questions, validated
from rc_agents.benchmarks.tasks.reference import Reference
from torch import Tensor

from rc_agents.demo.facts import normalise
from rc_agents.scoring import Scorer

STRANGER_TOKENS, OWN_TOKENS, SPARE_TOKENS = 16, 32, 3
SHOWN = 12  # answers kept in full


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What one world asks in one seed.

    Attributes:
        world: its name.
        sets: held-out questions by the name of their set.
        validation: questions about validation facts.
        choices: ten answers for every question of `sets`, by subject.
        strangers: prompts about subjects nobody was taught.
        answers: what an answer can be, normalised.
        spelled: the answers as they are written, the longest of which says how many tokens an answer gets.
    """

    world: str
    sets: dict[str, list[Item]]
    validation: list[Item]
    choices: dict[str, list[str]]
    strangers: list[str]
    answers: frozenset[str]
    spelled: tuple[str, ...]


def exam(world: World, seed: int, sizes: Sizes) -> Exam:
    """Returns what a world asks in a seed."""
    splits = world.split(seed)
    held_out = {"held_out": splits.held_out}
    if splits.apart:
        held_out["apart"] = splits.apart
    sets = {
        name: ask(facts, world.asked, seed, count=sizes.held_out, crossed=sizes.crossed)
        for name, facts in held_out.items()
    }
    strangers = [Fact(subject, "") for subject in splits.strangers]
    return Exam(
        world=world.name,
        sets=sets,
        validation=ask(splits.validation, validated(world), seed, count=sizes.validation),
        choices={
            item.fact.subject: world.choices(item.fact, seed, min(10, len(set(world.answers))))
            for items in sets.values()
            for item in items
        },
        strangers=[
            item.prompt for item in ask(strangers, world.asked, seed, count=sizes.strangers)
        ],
        answers=frozenset(map(normalise, world.answers)),
        spelled=tuple(dict.fromkeys(world.answers)),
    )


def evaluate(
    scorer: Scorer, exams: Sequence[Exam], sizes: Sizes, reference: Reference, tokenizer: Any
) -> dict[str, Any]:
    """Returns every score of a method, as plain data.

    Args:
        scorer: the method's.
        exams: one a world.
        sizes: of the parts that no world has.
        reference: the frozen anchor's answers.
        tokenizer: the anchor's, which counts an answer's tokens.
    """
    return {
        "worlds": {one.world: _world(scorer, one, reference, tokenizer) for one in exams},
        "general": _general(scorer, sizes, reference),
        "own": _own(scorer, sizes, reference),
    }


def _world(scorer: Scorer, one: Exam, reference: Reference, tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, items in one.sets.items():
        found[name] = {
            "exact": exact(scorer, items, one, tokenizer),
            "choice": choice(scorer, items, one.choices),
        }
    if one.strangers:
        found["strangers"] = strangers(scorer, one, reference)
    return found


def exact(scorer: Scorer, items: Sequence[Item], one: Exam, tokenizer: Any) -> dict[str, Any]:
    """Exact match: outcomes in the items' order, their templates, and the first answers in full."""
    spelled = tokenizer([f" {answer}" for answer in one.spelled], add_special_tokens=False)
    tokens = max(map(len, spelled.input_ids)) + SPARE_TOKENS
    answers = scorer.generate([item.prompt for item in items], tokens, first_line=True)
    right = [item.right(answer) for item, answer in zip(items, answers, strict=True)]
    return {
        "outcomes": bits(right),
        "templates": [item.template for item in items],
        "shown": [[items[k].prompt, items[k].fact.answer, answers[k]] for k in range(len(items))][
            :SHOWN
        ],
    }


def choice(scorer: Scorer, items: Sequence[Item], choices: dict[str, list[str]]) -> dict[str, Any]:
    """The right answer among several by log-probability; with it how likely the right one is, in nats."""
    pairs = [(item.prompt, f" {name}") for item in items for name in choices[item.fact.subject]]
    scores = iter([found.logprob for found in scorer.loglikelihood(pairs)])
    right, likely, shares = [], [], []
    for item in items:
        row = {name: next(scores) for name in choices[item.fact.subject]}
        right.append(max(row, key=row.__getitem__) == item.fact.answer)
        likely.append(round(row[item.fact.answer], 4))
        shares.append(1 / len(row))
    return {"outcomes": bits(right), "logprob": likely, "chance": sum(shares) / len(shares)}


def strangers(scorer: Scorer, one: Exam, reference: Reference) -> dict[str, Any]:
    """How far a method stays the frozen anchor where nobody knows an answer."""
    expected = reference.answers(one.strangers, STRANGER_TOKENS)
    answers = scorer.generate(one.strangers, STRANGER_TOKENS)
    own, theirs = scorer.next_logprobs(one.strangers), reference.logprobs(one.strangers)
    return {
        "same": bits([a == b for a, b in zip(answers, expected, strict=True)]),
        "invented": bits([invents(answer, one.answers) for answer in answers]),
        "anchor_invented": bits([invents(answer, one.answers) for answer in expected]),
        "kl": divergences(theirs, own),
        "shown": [list(row) for row in zip(one.strangers, expected, answers, strict=True)][:SHOWN],
    }


def invents(answer: str, answers: frozenset[str]) -> bool:
    """Whether an answer's first line starts with one of the world's answers, as whole words."""
    words = first_line(answer).split()
    return any(" ".join(words[:count]) in answers for count in range(1, len(words) + 1))


def divergences(expected_NV: Tensor, found_NV: Tensor) -> list[float] | None:
    """KL(expected || found) of each row in nats; None where the vocabularies differ."""
    if expected_NV.shape != found_NV.shape:
        return None
    each = (expected_NV.exp() * (expected_NV - found_NV)).sum(-1)
    return [round(float(value), 5) for value in each]


def _general(scorer: Scorer, sizes: Sizes, reference: Reference) -> dict[str, Any]:
    chosen = documents("test", sizes.documents)
    return losses(scorer, chosen, sizes.document_tokens, reference)


def losses(
    scorer: Scorer, chosen: Sequence[str], tokens: int, reference: Reference
) -> dict[str, Any]:
    """Loss of each document, beside the frozen anchor's."""
    found, expected = scorer.nll(chosen, tokens), reference.nll(chosen, tokens)
    return {
        "nll": [round(value, 4) for value, _ in found],
        "tokens": [count for _, count in found],
        "anchor_nll": [round(value, 4) for value, _ in expected],
        "anchor_tokens": [int(count) for _, count in expected],
    }


def _own(scorer: Scorer, sizes: Sizes, reference: Reference) -> dict[str, Any]:
    chosen = questions(sizes.questions)
    expected = reference.answers(chosen, OWN_TOKENS)
    answers = scorer.generate(chosen, OWN_TOKENS)
    return {"same": bits([a == b for a, b in zip(answers, expected, strict=True)])}


def bits(outcomes: Sequence[bool]) -> str:
    """Returns outcomes as a string of 0 and 1."""
    return "".join("01"[bool(one)] for one in outcomes)
