"""What a node shows of a text: one state for all its tokens. Shapes: B texts, T tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

POOLINGS = ("last", "mean", "attention")


def last(states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns the last real token's state, (B, D)."""
    places_B = last_places(mask_BT).to(states_BTD.device)
    return states_BTD[torch.arange(len(states_BTD), device=states_BTD.device), places_B]


def last_places(mask_BT: Tensor) -> Tensor:
    """Returns where the last real token of each text stands, (B,), under either padding."""
    counted = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    return (mask_BT.long() * counted).argmax(-1)


def mean(states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns the mean over real tokens, (B, D)."""
    weights = mask_BT.to(states_BTD)[..., None]
    return (states_BTD * weights).sum(1) / weights.sum(1).clamp(min=1)


class AttentionPool(nn.Module):
    """softmax over tokens of (q . h_t / rms(h_t)) / sqrt(D), q learned; q = 0 at the start is the mean.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Returns (B, D)."""
        states = states_BTD.to(self.query.dtype)
        normal = nn.functional.rms_norm(states, (states.shape[-1],))
        scores_BT = (normal @ self.query) * states.shape[-1] ** -0.5
        weights_BT = scores_BT.masked_fill(
            ~mask_BT.bool().to(scores_BT.device), -torch.inf
        ).softmax(-1)
        return (weights_BT[..., None] * states).sum(1)
