"""Chooses when specialists sleep, by what each setting spares and costs on texts that are decoded token by token.

B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError
from ..modeling import CoupledForCausalLM
from ..sparse import Sparse

CANDIDATES = tuple(Sparse(wake=wake) for wake in (1.0, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002))
"""What is tried where nothing is said: from never waking again within an answer to waking at the slightest guess."""


@dataclass(frozen=True)
class Point:
    """One setting on the validation texts.

    Attributes:
        settings: what was tried.
        skipped: share of (token, specialist) pairs that were skipped.
        cost: by how much perplexity rose over that of dense passes, 0.01 for one percent.
        repeated: passes that were run again, for each that was decoded.
    """

    settings: Sparse
    skipped: float
    cost: float
    repeated: float


@dataclass(frozen=True)
class Chosen:
    """The setting that skips most at no more than the wanted cost, None where each costs more; and all of them."""

    settings: Sparse | None
    curve: tuple[Point, ...]


def choose_sparse(
    model: CoupledForCausalLM,
    texts: Sequence[str],
    *,
    cost: float = 0.005,
    candidates: Sequence[Sparse] = CANDIDATES,
    prompt: int = 16,
    length: int = 64,
) -> Chosen:
    """Returns the setting that skips most without costing more than wanted, with the whole curve.

    Args:
        model: the ensemble.
        texts: validation texts as they will be written; only the first `length` tokens are read, shorter ones not.
        cost: by how much perplexity may rise, 0.005 for half a percent.
        candidates: the settings to try.
        prompt: tokens of each text that are read in one pass.
        length: tokens of each text.

    Raises:
        DataError: no text is long enough.
    """
    rows = [model.tokenizer(text, return_tensors="pt")["input_ids"][:, :length] for text in texts]
    rows = [row for row in rows if row.shape[1] == length]
    if not rows:
        raise DataError(f"no text has {length} tokens; pass longer ones, or a smaller length")
    ids_BT = torch.cat(rows).to(model.device)
    dense = decoded_losses(model, ids_BT, prompt).mean().item()
    points = []
    for settings in candidates:
        with model.sparse(settings) as spared:
            loss = decoded_losses(model, ids_BT, prompt).mean().item()
        again = spared.repeated / (length - prompt)
        points.append(Point(settings, spared.share, math.expm1(loss - dense), again))
    cheap = [point for point in points if point.cost <= cost]
    best = max(cheap, key=lambda point: point.skipped, default=None)
    return Chosen(None if best is None else best.settings, tuple(points))


@torch.inference_mode()
def decoded_losses(model: CoupledForCausalLM, ids_BT: Tensor, prompt: int) -> Tensor:
    """Returns the loss at each token behind a prompt, one pass a token over a cache, (B, T - prompt) in nats."""
    out = model(ids_BT[:, :prompt], use_cache=True, logits_to_keep=1)
    losses = []
    for at in range(prompt, ids_BT.shape[1]):
        scores_BV = out.logits[:, -1].float()
        losses.append(torch.nn.functional.cross_entropy(scores_BV, ids_BT[:, at], reduction="none"))
        out = model(ids_BT[:, at : at + 1], past_key_values=out.past_key_values)
    return torch.stack(losses, dim=1)
