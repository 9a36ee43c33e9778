"""Forgetting: is a method still the frozen anchor on what neither training nor the specialist is about?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rc_agents.benchmarks.scores import Score
from rc_agents.benchmarks.tasks.items import documents, questions

from rc_agents.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """General text and the anchor's own questions.

    Args:
        documents, tokens: of general text, and how much of each.
        questions, answer_tokens: general questions, and greedy tokens of each answer.
    """

    documents: int = 48
    tokens: int = 128
    questions: int = 40
    answer_tokens: int = 24

    def texts(self, bench: Any) -> list[str]:
        """The documents and the questions."""
        return [*documents("test", self.documents), *questions(self.questions)]

    def run(self, bench: Any, scorer: Scorer) -> dict[str, Score]:
        """`general_perplexity`, and the share of questions with the frozen anchor's very tokens."""
        found = scorer.nll(documents("test", self.documents), self.tokens)
        asked = questions(self.questions)
        expected = bench.reference.answers(asked, self.answer_tokens)
        answers = scorer.generate(asked, self.answer_tokens)
        return {
            "general_perplexity": Score(
                values=[nll for nll, _ in found],
                weights=[count for _, count in found],
                kind="perplexity",
                better="lower",
            ),
            "own_answers": Score(
                values=[float(a == b) for a, b in zip(answers, expected, strict=True)]
            ),
        }
