"""One bridge: h_i <- h_i + gate(h_j, h_i) W n(h_j), the equation of Residual Coupling (Ekin, 2026).

With `update="blend"` it is h_i <- h_i + gate(h_j, h_i) (W n(h_j) - h_i), as in highway networks (Srivastava et al.,
2015): where the gate is open the target goes on from what it hears instead of from the sum of both. With
`reads="prediction"` the map reads what the source would say next in place of its state (`Prediction`); the gate reads
the state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import BridgeConfig
from .bottleneck import BottleneckMap
from .gate import GATES
from .linear import LinearMap
from .low_rank import LowRankMap
from .pooling import QueryPool
from .prediction import Prediction
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

    Args:
        config: its form.
        source_width, target_width: of the two streams.
        pools: whether the source's positions are not the target's, so that a `QueryPool` carries them over.
    """

    def __init__(
        self, config: BridgeConfig, source_width: int, target_width: int, *, pools: bool = False
    ) -> None:
        super().__init__()
        self.normalize_source = config.normalize_source
        self.blends = config.update == "blend"
        self.reading: Prediction | None = None  # set where the models are known
        self.read_width = target_width if config.reads == "prediction" else source_width
        self.map = MAPS[config.kind](config, self.read_width, target_width)
        self.gate = GATES[config.gate](config, source_width, target_width)
        self.pool = QueryPool(source_width, target_width) if pools else None

    def forward(
        self, source_BTD: Tensor, target_BTD: Tensor, heard_BTD: Tensor | None = None
    ) -> Tensor:
        """Returns the update for the target.

        Args:
            source_BTD: the source's states at the positions the targets read, (B, T, source_width).
            target_BTD: the target's states, (B, T, target_width), before it heard anybody at this site.
            heard_BTD: the same as earlier edges have left them, which a blend replaces; by default nobody spoke.

        Returns:
            (B, T, target_width), in the target's dtype and on its device.
        """
        work = torch.promote_types(torch.float32, source_BTD.dtype)
        source, target = source_BTD.to(work), target_BTD.to(work)
        gate = self.gate(source, target)
        if self.reading is not None:
            source = self._read(self.reading, source_BTD, gate).to(target.device, work)
        scale = rms(target) / (rms(source) + EPS) if self.normalize_source else 1.0
        update = self.map(source) * (scale * gate)
        if self.blends:
            heard = target if heard_BTD is None else heard_BTD.to(work)
            update = update - heard * gate
        if self.blends or self.reading is not None:
            update = update * source_BTD.any(
                -1, keepdim=True
            )  # zeros are silence, as in an added map
        return update.to(target_BTD.dtype)

    def openness(self, source_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """Returns the gate before its floor, (B, T), in float32 as in `forward`; one value if it reads none."""
        work = torch.promote_types(torch.float32, source_BTD.dtype)
        gate = self.gate.unfloored(source_BTD.to(work), target_BTD.to(work))
        return (
            gate.squeeze(-1) if isinstance(gate, Tensor) and gate.dim() else torch.as_tensor(gate)
        )

    def _read(self, reading: Prediction, source_BTD: Tensor, gate: Tensor | float) -> Tensor:
        """Returns what the source would say, (B, T, D_target); zeros where a shut gate lets nothing of it through."""
        if torch.is_grad_enabled() or not isinstance(gate, Tensor) or not gate.dim():
            return reading(source_BTD)
        speaks_BT = gate.squeeze(-1) != 0
        read_BTD = source_BTD.new_zeros(*source_BTD.shape[:2], self.read_width)
        if speaks_BT.any():
            read_BTD[speaks_BT] = reading(source_BTD[speaks_BT][None])[0].to(read_BTD)
        return read_BTD
