"""Samples that belong to their seed, whatever else draws from torch's one global generator meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .errors import InputError


class SeededSampling(LogitsProcessor):
    """Draws each row's next token from that row's own stream and leaves only that token possible.

    Placed behind every other processor, so that `generate`'s own draw has one choice. The number drawn depends on the
    row's seed and on how many tokens it has generated, on nothing else.

    Args:
        seeds: one a row.
        prompt_length: columns of the prompt.
        keep_scores: keep what came in at every step in `scores`, step -> (B, V), for `output_scores`; assisted
            decoding comes to a step again after a rejected guess, and the last time counts.
    """

    def __init__(
        self, seeds: Sequence[int], prompt_length: int, *, keep_scores: bool = False
    ) -> None:
        self.seeds = list(seeds)
        self.prompt_length = prompt_length
        self.keep_scores = keep_scores
        self.scores: dict[int, Tensor] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T) tokens so far and (B, V) scores -> scores in which one token a row is left."""
        step = input_ids.shape[1] - self.prompt_length
        if self.keep_scores:
            self.scores[step] = scores.clone()  # assisted decoding writes into it
        draws = torch.tensor(
            [_uniform(seed, step) for seed in self.seeds], dtype=torch.float64, device=scores.device
        )
        mass = scores.double().softmax(-1).cumsum(-1)  # (B, V)
        chosen = torch.searchsorted(mass, (draws * mass[:, -1])[:, None], right=True).clamp(
            max=scores.shape[1] - 1
        )
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) from a generator of its own."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def row_seeds(seed: int | Sequence[int], batch: int, copies: int) -> list[int]:
    """Returns a seed for each of `batch * copies` rows: an int counts up over the rows, a list gives one a prompt.

    A row of a batch with `seed=s` therefore equals the single call with `seed=s + row`.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, Sequence)) or isinstance(seed, str):
        raise InputError(f"seed is an integer or one a row, got {seed!r}")
    if isinstance(seed, int):
        return [seed + row for row in range(batch * copies)]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in seed):
        raise InputError(f"seed is an integer or one a row, got {seed!r}")
    if len(seed) != batch:
        raise InputError(f"seed has {len(seed)} entries for a batch of {batch} rows")
    return [one + copy for one in seed for copy in range(copies)]
