"""W, a full matrix without bias: the published bridge."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import BridgeConfig
from ..errors import ConfigError


class LinearMap(nn.Module):
    """y = W x with W of shape (target_width, source_width)."""

    def __init__(self, config: BridgeConfig, source_width: int, target_width: int) -> None:
        super().__init__()
        linear = nn.Linear(source_width, target_width, bias=False, dtype=torch.float32)
        self.weight = nn.Parameter(linear.weight.detach())
        if config.start in ("zero", "ridge"):
            nn.init.zeros_(self.weight)
        elif config.start == "identity":
            if source_width != target_width:
                raise ConfigError(
                    f"start='identity' needs models of equal width, got source {source_width} and "
                    f"target {target_width}; use start='ridge' or 'zero'"
                )
            nn.init.eye_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., source_width) -> (..., target_width)."""
        return nn.functional.linear(x, self.weight.to(x.dtype))
