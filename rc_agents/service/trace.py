"""What happened at each token of an answer: how likely it was, and how much each specialist added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import InputError
from ..modeling import CoupledForCausalLM
from ..topology import ANCHOR
from .params import GenerationParams


@dataclass(frozen=True)
class TokenRecord:
    """One token of an answer, or of a prompt.

    Attributes:
        token: its id.
        logprob: in nats, before temperature, cuts, biases and guides; None where it was not asked for.
        top: the likeliest tokens with theirs, falling.
        contributions: specialist -> how much its bridges added to the anchor's stream where this token was chosen: the
            norm of what each adds, over the norm of the stream, summed over sites. Empty where it was not asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    contributions: Mapping[str, float] = field(default_factory=dict)


class Trace:
    """Records one row's tokens.

    Args:
        logprobs: how many of the likeliest tokens to keep; None for no probabilities.
        attribution: whether to keep contributions.
    """

    def __init__(self, logprobs: int | None, attribution: bool) -> None:
        self.logprobs, self.attribution = logprobs, attribution
        self.records: list[TokenRecord] = []
        self._scores: Tensor | None = None
        self.contributions: dict[str, float] = {}

    def see(self, scores_V: Tensor) -> None:
        """Takes the scores from which the next token is chosen."""
        if self.logprobs is not None:
            self._scores = scores_V.float().log_softmax(-1)

    def push(self, token: int) -> None:
        """Takes the token that was chosen."""
        added = dict(self.contributions) if self.attribution else {}
        if self._scores is None:
            self.records.append(TokenRecord(token, contributions=added))
        else:
            self.records.append(record(token, self._scores, self.logprobs or 0, added))


class Traced(LogitsProcessor):
    """Shows a row's scores to its trace, and leaves them as they are."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(1, T) tokens so far and (1, V) scores -> the scores."""
        self.trace.see(scores[0])
        return scores


class Biased(LogitsProcessor):
    """Adds a number to the scores of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids, self._values = list(bias), list(bias.values())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(1, T) tokens so far and (1, V) scores -> (1, V)."""
        scores = scores.clone()
        scores[:, self._ids] += scores.new_tensor(self._values)
        return scores


def record(
    token: int, logprobs_V: Tensor, top: int, contributions: Mapping[str, float] | None = None
) -> TokenRecord:
    """Returns a token's record from the log-probabilities at its place."""
    values, ids = logprobs_V.topk(min(top, len(logprobs_V)))
    likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenRecord(token, float(logprobs_V[token]), likeliest, contributions or {})


_LISTENING: ContextVar[object] = ContextVar("rc_agents_attribution", default=None)


@contextmanager
def attributed(
    model: CoupledForCausalLM, traces: Sequence[Trace | None], choices: Sequence[GenerationParams]
) -> Iterator[None]:
    """Keeps, at each pass inside the block, what each specialist's bridges add to the anchor at the last position.

    Args:
        traces: one a row; those that ask for attribution take it.
        choices: of each row: who takes part, and how loud.

    Raises:
        InputError: the models meet in a router, which fuses instead of adding.
    """
    if not any(trace is not None and trace.attribution for trace in traces):
        yield
        return
    if model.config.bridge_config.kind == "moe":
        raise InputError("a router fuses the models' states; there is nothing to attribute")
    mark = object()
    handles = []
    for edge in model.edges:
        if edge.target == ANCHOR:
            factors = [_factor(one, edge.source) for one in choices]
            for site in range(len(model.sites)):
                hook = _hook(mark, edge.source, site, traces, factors)
                handles.append(model.bridge(edge, site).register_forward_hook(hook))
    token = _LISTENING.set(mark)
    try:
        yield
    finally:
        _LISTENING.reset(token)
        for handle in handles:
            handle.remove()


def _hook(
    mark: object,
    source: str,
    site: int,
    traces: Sequence[Trace | None],
    factors: Sequence[float | None],
) -> Any:
    def after(module: Any, args: tuple[Tensor, ...], update_BTD: Tensor) -> None:
        if _LISTENING.get() is not mark or len(update_BTD) != len(traces):
            return
        added = torch.linalg.vector_norm(update_BTD[:, -1].float(), dim=-1)
        stream = torch.linalg.vector_norm(args[1][:, -1].float(), dim=-1)
        for row, share in enumerate((added / (stream + 1e-12)).tolist()):
            trace, factor = traces[row], factors[row]
            if trace is not None and trace.attribution and factor is not None:
                before = trace.contributions.get(source, 0.0) if site else 0.0
                trace.contributions[source] = before + share * abs(factor)

    return after


def _factor(choice: GenerationParams, name: str) -> float | None:
    """How loud a specialist is in a row, None where it takes no part or is silent."""
    if choice.specialists is not None and name not in choice.specialists:
        return None
    strength = choice.strength
    factor = strength.get(name, 1.0) if isinstance(strength, Mapping) else strength
    return 1.0 if factor is None else float(factor) or None
