"""W frozen at nn.Linear's random start: the published control that shows whether structure must be learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import BridgeConfig


class RandomMap(nn.Module):
    """y = W x with W a buffer: saved with the bridge, never trained. Not off at the start whatever `start` says."""

    weight: Tensor

    def __init__(self, config: BridgeConfig, source_width: int, target_width: int) -> None:
        super().__init__()
        linear = nn.Linear(source_width, target_width, bias=False, dtype=torch.float32)
        self.register_buffer("weight", linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., source_width) -> (..., target_width)."""
        return nn.functional.linear(x, self.weight.to(x.dtype))
