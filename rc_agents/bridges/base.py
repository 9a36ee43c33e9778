"""One bridge: h_i <- h_i + gate(h_j, h_i) W n(h_j), the equation of Residual Coupling (Ekin, 2026)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import BridgeConfig
from .bottleneck import BottleneckMap
from .gate import GATES
from .linear import LinearMap
from .low_rank import LowRankMap
from .random import RandomMap

EPS = 1e-6
MAPS = {
    "linear": LinearMap,
    "low_rank": LowRankMap,
    "bottleneck": BottleneckMap,
    "random": RandomMap,
}


def rms(h: Tensor) -> Tensor:
    """Root mean square over the last dimension, kept: (..., D) -> (..., 1)."""
    return torch.linalg.vector_norm(h, dim=-1, keepdim=True) * (h.shape[-1] ** -0.5)


class Bridge(nn.Module):
    """A directed map at one site, from a stream of width `source_width` to one of width `target_width`.

    Its weights and its arithmetic are float32 whatever the models' dtype; only the result is cast.
    """

    def __init__(self, config: BridgeConfig, source_width: int, target_width: int) -> None:
        super().__init__()
        self.normalize_source = config.normalize_source
        self.map = MAPS[config.kind](config, source_width, target_width)
        self.gate = GATES[config.gate](config, source_width, target_width)

    def forward(self, source_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """Returns the update for the target.

        Args:
            source_BTD: the source's states at the positions the targets read, (B, T, source_width).
            target_BTD: the target's states, (B, T, target_width).

        Returns:
            (B, T, target_width), in the target's dtype and on its device.
        """
        work = torch.promote_types(torch.float32, source_BTD.dtype)
        source, target = source_BTD.to(work), target_BTD.to(work)
        gate = self.gate(source, target)
        if not self.normalize_source:
            return (self.map(source) * gate).to(target_BTD.dtype)
        scale = rms(target) / (rms(source) + EPS)
        return (self.map(source) * (scale * gate)).to(target_BTD.dtype)
