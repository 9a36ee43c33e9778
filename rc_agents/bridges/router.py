"""Mixture-of-experts router over hidden states: the published baseline, an exchange of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .named import Named


class Router(nn.Module):
    """fused = sum_i softmax(R mean_j h_j)_i h_i; every model goes on with `fused` (reference code, LatentMoE).

    The router's rows are kept per model, so that a model can be added or removed; together they are one
    nn.Linear(width, n).

    Args:
        names: the models.
        width: their common width.
    """

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.width = width
        self.rows = Named()
        for name in names:
            self.rows[name] = self.new_row()

    def new_row(self) -> nn.Linear:
        """Returns a row for one more model, at nn.Linear's default start."""
        row = nn.Linear(self.width, 1, dtype=torch.float32)
        return row.to(next(self.parameters(), row.weight).device)

    def add(self, name: str, row: nn.Linear) -> None:
        """Takes in a model's row."""
        self.rows[name] = row

    def remove(self, name: str) -> None:
        """Forgets a model's row."""
        del self.rows[name]

    def forward(
        self, states: dict[str, Tensor], presence: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Returns every model's new state.

        Args:
            states: by name, each (B, T, width), same positions.
            presence: whether each model takes part in each row, (B,) by name; None where all do.
        """
        home = next(self.parameters()).device
        stack = torch.stack([h.to(home, torch.float32) for h in states.values()])  # (N, B, T, D)
        on = torch.ones(stack.shape[:2], dtype=torch.bool, device=home)
        if presence is not None:
            on = torch.stack([presence[name].to(home) for name in states])
        on = on[..., None, None]
        mean = (stack * on).sum(0) / on.sum(0)
        logits = torch.stack([self.rows[name](mean) for name in states])  # (N, B, T, 1)
        weights = logits.masked_fill(~on, -torch.inf).softmax(0)
        fused = (weights * stack).sum(0)
        return {
            name: torch.where(here.to(h.device), fused.to(h.device, h.dtype), h)
            for here, (name, h) in zip(on, states.items(), strict=True)
        }


def check_widths(widths: dict[str, int]) -> None:
    """Raises `ConfigError` unless all models are equally wide, as a router over states needs."""
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ConfigError(
            f"kind='moe' mixes states and needs models of equal width, got {shown}; use kind='linear'"
        )
