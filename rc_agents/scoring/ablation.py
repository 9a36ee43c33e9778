"""A scorer whose ensemble hears something else than its specialists."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..execution.ablations import Ablation, ablated
from .causal import CausalScorer
from .protocol import Cost, Likelihood, Loss


class AblatedScorer:
    """Answers as `scorer` does while every bridge reads zeros, or another prompt's states.

    Args:
        scorer: of an ensemble.
        how: see `rc_agents.scoring.ablated`.
        seed: which other prompt.
    """

    def __init__(self, scorer: CausalScorer, how: Ablation, seed: int = 0) -> None:
        self.scorer, self.how, self.seed = scorer, how, seed

    @property
    def cost(self) -> Cost:
        """What answering has cost so far."""
        return self.scorer.cost

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """As the protocol says."""
        with ablated(self.scorer.model, self.how, self.seed):
            return self.scorer.loglikelihood(pairs)

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 16, *, first_line: bool = False
    ) -> list[str]:
        """As the protocol says."""
        with ablated(self.scorer.model, self.how, self.seed):
            return self.scorer.generate(prompts, max_new_tokens, first_line=first_line)

    def next_logprobs(self, prompts: Sequence[str]) -> Tensor:
        """As the protocol says."""
        with ablated(self.scorer.model, self.how, self.seed):
            return self.scorer.next_logprobs(prompts)

    def nll(self, texts: Sequence[str], max_length: int = 128) -> list[tuple[float, int]]:
        """As the protocol says."""
        with ablated(self.scorer.model, self.how, self.seed):
            return self.scorer.nll(texts, max_length)

    def rolling_nll(self, texts: Sequence[str], window: int = 256, stride: int = 128) -> list[Loss]:
        """As the protocol says."""
        with ablated(self.scorer.model, self.how, self.seed):
            return self.scorer.rolling_nll(texts, window, stride)
