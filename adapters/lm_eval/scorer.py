"""Anything that answers the `Scorer` protocol, as a model of lm-eval."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from rc_agents.errors import InputError
from rc_agents.scoring import Scorer

MAX_NEW_TOKENS = 256
"""Where a task says nothing, as in lm-eval's own models."""
SAMPLING = ("temperature", "top_p", "top_k")


class ScorerLM(LM):
    """lm-eval over a scorer: an ensemble, a baseline, a mixture of models, a chain of agents.

    A scorer reads plain text and tokenizes context and continuation apart, where lm-eval's own models tokenize them as
    one text; the two differ where a token would span the border.

    Args:
        scorer: answers all requests.
        window, stride: in tokens, for whole texts (`loglikelihood_rolling`); the first token of a text has no score.
    """

    def __init__(self, scorer: Scorer, *, window: int = 512, stride: int = 256) -> None:
        super().__init__()
        self.scorer, self.window, self.stride = scorer, window, stride

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """As lm-eval says.

        Raises:
            InputError: a continuation without a context.
        """
        pairs = [request.args for request in requests]
        if any(not context for context, _ in pairs):
            raise InputError(
                "a scorer needs a context before each continuation, got an empty one; use EnsembleLM for this task"
            )
        return [(one.logprob, one.is_greedy) for one in self.scorer.loglikelihood(pairs)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """As lm-eval says, in windows of `window` tokens."""
        texts = [request.args[0] for request in requests]
        return [-one.nll for one in self.scorer.rolling_nll(texts, self.window, self.stride)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first stop string.

        Raises:
            InputError: a task that samples.
        """
        by_limit: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            by_limit.setdefault(_limit(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        for limit, numbers in by_limit.items():
            made = self.scorer.generate([requests[one].args[0] for one in numbers], limit)
            for number, text in zip(numbers, made, strict=True):
                answers[number] = _cut(text, requests[number].args[1].get("until") or [])
        return answers


def _limit(options: dict[str, Any]) -> int:
    if options.get("do_sample") and any(options.get(name) not in (None, 0) for name in SAMPLING):
        raise InputError(f"a scorer answers greedily, and the task samples: {options!r}")
    asked = options.get("max_gen_toks", options.get("max_new_tokens"))
    return int(asked or MAX_NEW_TOKENS)


def _cut(text: str, until: str | list[str]) -> str:
    stops = [until] if isinstance(until, str) else until
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
