"""W = B A of a given rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import BridgeConfig


class LowRankMap(nn.Module):
    """y = B A x with A (rank, source_width) and B (target_width, rank); B starts at zero unless start="default"."""

    def __init__(self, config: BridgeConfig, source_width: int, target_width: int) -> None:
        super().__init__()
        rank = int(config.rank or 1)
        self.down = nn.Linear(source_width, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, target_width, bias=False, dtype=torch.float32)
        if config.start != "default":
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., source_width) -> (..., target_width)."""
        inner = nn.functional.linear(x, self.down.weight.to(x.dtype))
        return nn.functional.linear(inner, self.up.weight.to(x.dtype))
