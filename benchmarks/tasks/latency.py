"""How long an answer takes, by the length of the prompt and of the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rc_agents.benchmarks.domains import KINDS
from rc_agents.benchmarks.scores import Score

from rc_agents.errors import ConfigError
from rc_agents.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Wall time of greedy answers, one question at a time; compare figures of one run on one machine alone.

    Args:
        prompts: words of a prompt, from general text that scores nothing.
        answers: most new tokens of an answer.
        count: answers a pair of lengths; one before them is not counted.
    """

    prompts: tuple[int, ...] = (32, 128)
    answers: tuple[int, ...] = (1, 32)
    count: int = 5

    def __post_init__(self) -> None:
        if min(*self.prompts, *self.answers, self.count) < 1:
            raise ConfigError("prompts, answers and count are numbers of at least 1")

    def texts(self, bench: Any) -> list[str]:
        """None: what the answers say is not scored."""
        return []

    def run(self, bench: Any, scorer: Scorer) -> dict[str, Score]:
        """`PROMPT/ANSWER/seconds` and `.../first_token_seconds`, one value an answer."""
        words = " ".join(KINDS["general"]()).split()
        found = {}
        for size in self.prompts:
            starts = range(0, size * (self.count + 1), size)
            texts = [" ".join(words[start : start + size]) for start in starts]
            for tokens in self.answers:
                rows = [_seconds(scorer, text, tokens) for text in texts][1:]
                for place, name in enumerate(("seconds", "first_token_seconds")):
                    values = [row[place] for row in rows]
                    score = Score(values=values, kind="seconds", better="lower")
                    found[f"{size}/{tokens}/{name}"] = score
        return found


def _seconds(scorer: Scorer, text: str, tokens: int) -> tuple[float, float]:
    before = scorer.cost.seconds, scorer.cost.first_token_seconds
    scorer.generate([text], tokens)
    after = scorer.cost.seconds, scorer.cost.first_token_seconds
    return after[0] - before[0], after[1] - before[1]
