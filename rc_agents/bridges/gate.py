"""When and how loudly a bridge speaks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import BridgeConfig


class Gate(nn.Module):
    """Maps the two ends' states to a factor that broadcasts over (B, T, D).

    Attributes:
        reads_source, reads_target: whether the state at that end can change it.
        floor: below it the gate is shut.
    """

    reads_source = reads_target = False
    floor = 0.0

    def __init__(self, config: BridgeConfig, source_width: int, target_width: int) -> None:
        super().__init__()

    def forward(self, source_BTD: Tensor, target_BTD: Tensor) -> Tensor | float:
        """Returns the factor."""
        raise NotImplementedError

    def unfloored(self, source_BTD: Tensor, target_BTD: Tensor) -> Tensor | float:
        """Returns what it would be without a floor."""
        return self(source_BTD, target_BTD)


class FixedGate(Gate):
    """The constant 1: the published "no gate" ablation."""

    def forward(self, source_BTD: Tensor, target_BTD: Tensor) -> float:
        """Returns 1."""
        return 1.0


class ScalarGate(Gate):
    """sigmoid(g), one g a bridge: the published gate."""

    def __init__(self, config: BridgeConfig, source_width: int, target_width: int) -> None:
        super().__init__(config, source_width, target_width)
        self.value = nn.Parameter(torch.tensor(float(config.gate_init), dtype=torch.float32))

    def forward(self, source_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """Returns a scalar."""
        return torch.sigmoid(self.value.to(source_BTD.dtype))


class TokenGate(Gate):
    """sigmoid(g + v . n(h_source) + u . n(h_target)) for every token, n the RMS norm; u and v start at zero.

    The map stays linear; the gate decides at which tokens the bridge speaks. A gate below `gate_floor` is shut: exactly
    0, so that the target keeps every bit there. Its gradient is that of the open gate (straight-through), so that it
    can open again.
    """

    def __init__(self, config: BridgeConfig, source_width: int, target_width: int) -> None:
        super().__init__(config, source_width, target_width)
        self.value = nn.Parameter(torch.tensor(float(config.gate_init), dtype=torch.float32))
        self.floor = config.gate_floor
        widths = {"source": source_width, "target": target_width}
        reads = ("source", "target") if config.gate_reads == "both" else (config.gate_reads,)
        self.reads_source, self.reads_target = "source" in reads, "target" in reads
        self.reads = nn.ParameterDict(
            {end: nn.Parameter(torch.zeros(widths[end])) for end in reads}
        )

    def forward(self, source_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """Returns (B, T, 1)."""
        gate = self.unfloored(source_BTD, target_BTD)
        if not self.floor:
            return gate
        return gate - gate.masked_fill(gate >= self.floor, 0).detach()

    def unfloored(self, source_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """Returns the sigmoid itself, (B, T, 1)."""
        ends = {"source": source_BTD, "target": target_BTD}
        logit = self.value.to(source_BTD.dtype)
        for end, weight in self.reads.items():
            state = ends[end]
            normal = nn.functional.rms_norm(state, (state.shape[-1],), eps=1e-6)
            logit = logit + (normal @ weight.to(state.dtype)).unsqueeze(-1)
        return torch.sigmoid(logit)


GATES: dict[str, type[Gate]] = {"fixed": FixedGate, "scalar": ScalarGate, "token": TokenGate}
