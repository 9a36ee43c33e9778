"""What every method answers, so that no evaluation knows which one it asks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Likelihood(NamedTuple):
    """How likely a continuation is behind its prompt.

    Attributes:
        logprob: sum over its tokens, in nats.
        is_greedy: whether each of its tokens is the likeliest one.
        num_tokens: of the continuation.
    """

    logprob: float
    is_greedy: bool
    num_tokens: int


class Loss(NamedTuple):
    """What a whole text costs a model.

    Attributes:
        nll: summed over its scored tokens, in nats.
        num_tokens: that were scored.
        num_bytes: of the text that those tokens spell.
    """

    nll: float
    num_tokens: int
    num_bytes: int


@dataclass
class Cost:
    """What answering has cost so far.

    Attributes:
        passes: forward passes, counted for every frozen model that runs.
        tokens: real tokens that these passes took in.
        calls: answers that a model was asked for.
        prompt_tokens, completion_tokens: that those answers read and wrote.
        first_token_seconds: wall time from each question to the first token of its answer, summed; of questions that
            share a batch, that of the batch.
        seconds, cpu_seconds: wall time, and processor time of all threads.
        trained_parameters: of the method.
    """

    passes: int = 0
    tokens: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    trained_parameters: int = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time of the block."""
        wall, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - wall
            self.cpu_seconds += time.process_time() - processor

    def plus(self, other: Cost) -> Cost:
        """Returns both together."""
        mine, theirs = asdict(self), asdict(other)
        return Cost(**{name: mine[name] + theirs[name] for name in mine})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)


class Scorer(Protocol):
    """Something that answers; all prompts are plain text."""

    @property
    def cost(self) -> Cost:
        """What it has cost so far."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Scores continuations behind prompts, in the order given."""

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 16, *, first_line: bool = False
    ) -> list[str]:
        """Greedy answers; with `first_line` each ends after its first line that is not empty."""

    def next_logprobs(self, prompts: Sequence[str]) -> Tensor:
        """Log-probabilities of the token behind each prompt, (N, V) float32 on the processor."""

    def nll(self, texts: Sequence[str], max_length: int = 128) -> list[tuple[float, int]]:
        """For each text the summed loss in nats over its first `max_length` tokens, and how many were scored."""

    def rolling_nll(self, texts: Sequence[str], window: int = 256, stride: int = 128) -> list[Loss]:
        """The loss of whole texts in windows of `window` tokens that move by `stride`; every token counts once."""
