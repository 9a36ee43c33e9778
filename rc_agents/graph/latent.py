"""The shared latent space: how nodes write into it, how what they wrote is brought together, how a node hears it.

For a target t and the nodes s that it hears, with p_s what s shows (`pooling`):

    z_s = E_s n(p_s)                     an encode edge, one E_s (D_latent x D_s) a node, whoever hears it
    z   = n(sum_s a_ts z_s)              a_ts = 1 / |s| (mean), or softmax_s(q_t . z_s / sqrt(D_latent) + b_ts)
    h_t <- h_t + strength rms(h_t) I_t z  an injection edge, I_t (D_t x D_latent), behind block `at`

n brings to RMS 1. Without `normalize` n is the identity and rms(h_t) is 1. The form, without attention and
normalisation, is that of Armstrong, Ayoobi and Mukherjee, 2026 (arXiv 2604.08335), as its abstract gives it.

Shapes: B texts, T tokens, S nodes heard, D width. Weights and arithmetic are float32, as in bridges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bridges import Bridge, rms
from ..config import BridgeConfig
from .settings import LatentConfig, NodeConfig

EPS = 1e-6


def unit(x: Tensor) -> Tensor:
    """Brings to RMS 1 over the last dimension; zeros stay zeros."""
    return x / (rms(x) + EPS)


class Encode(nn.Module):
    """An encode edge, z_s = E_s n(p_s)."""

    def __init__(self, latent: LatentConfig, source_width: int) -> None:
        super().__init__()
        self.normalize = latent.normalize
        self.map = nn.Linear(source_width, latent.width, bias=False, dtype=torch.float32)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Returns (B, D_latent)."""
        pooled = pooled_BD.to(self.map.weight.device, self.map.weight.dtype)
        return self.map(unit(pooled) if self.normalize else pooled)


class Mean(nn.Module):
    """The published aggregate: all weigh the same."""

    def __init__(self, num_sources: int, width: int) -> None:
        super().__init__()

    def forward(self, written_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the aggregate (B, D) and the weights (B, S)."""
        count = written_BSD.shape[1]
        return written_BSD.mean(1), written_BSD.new_full(written_BSD.shape[:2], 1 / count)


class Attend(nn.Module):
    """Weights by a learned query and a bias a source; both start at zero, which is the mean."""

    def __init__(self, num_sources: int, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(num_sources))

    def forward(self, written_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the aggregate (B, D) and the weights (B, S)."""
        scores_BS = (unit(written_BSD) @ self.query) * written_BSD.shape[-1] ** -0.5 + self.bias
        weights_BS = scores_BS.softmax(-1)
        return (weights_BS[..., None] * written_BSD).sum(1), weights_BS


AGGREGATES: dict[str, type[nn.Module]] = {"mean": Mean, "attention": Attend}


class Strength(nn.Module):
    """How loudly a node hears: a constant, or learned."""

    def __init__(self, node: NodeConfig) -> None:
        super().__init__()
        value = torch.tensor(float(node.strength))
        if node.learn_strength:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    def forward(self) -> Tensor:
        """Returns a scalar."""
        return self.value


class Hear(nn.Module):
    """All that reaches one node through the latent space.

    Args:
        latent: the space.
        node: the one that hears.
        width: of its stream.
    """

    def __init__(self, latent: LatentConfig, node: NodeConfig, width: int) -> None:
        super().__init__()
        self.sources, self.normalize = node.hears, latent.normalize
        self.aggregate = AGGREGATES[latent.aggregate](len(node.hears), latent.width)
        self.map = nn.Linear(latent.width, width, bias=False, dtype=torch.float32)
        self.strength = Strength(node)

    def latent(self, written: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns z (B, D_latent) and the weights of the sources (B, S)."""
        device = self.map.weight.device
        stacked_BSD = torch.stack([written[name].to(device) for name in self.sources], 1)
        z_BD, weights_BS = self.aggregate(stacked_BSD)
        return (unit(z_BD) if self.normalize else z_BD), weights_BS

    def said(self, written: Mapping[str, Tensor], shown: Mapping[str, Tensor]) -> Tensor:
        """Returns what the node hears before it is brought to its stream's size, (B, D)."""
        return self.map(self.latent(written)[0])

    def forward(self, said_BD: Tensor, heard_BTD: Tensor) -> Tensor:
        """Returns what is added to the states that hear, (B, T, D), in their dtype.

        Args:
            said_BD: what `said` gave.
            heard_BTD: the states at the positions that hear.
        """
        return added(said_BD, self.strength(), heard_BTD, normalize=self.normalize)


def added(said_BD: Tensor, strength: Tensor, heard_BTD: Tensor, *, normalize: bool) -> Tensor:
    """Returns strength rms(h) said, what is added to the states that hear, (B, T, D), in their dtype."""
    size = rms(heard_BTD.float()) if normalize else 1.0
    added_BTD = strength * size * said_BD.to(heard_BTD.device)[:, None]
    return added_BTD.expand_as(heard_BTD).to(heard_BTD.dtype)


@dataclass(frozen=True)
class Heard:
    """What one node hears of one batch: the states that hear (B, T, D) -> what is added to them.

    Attributes:
        module: the edge into the node.
        said: what the edge's `said` gave.
    """

    module: nn.Module
    said: Any

    def __call__(self, heard_BTD: Tensor) -> Tensor:
        """Returns what is added, (B, T, D)."""
        added_BTD: Tensor = self.module(self.said, heard_BTD)
        return added_BTD


class HearDirectly(nn.Module):
    """Bridges from every node that is heard, without a shared space: h_t <- h_t + sum_s sigmoid(g_ts) W_ts n(p_s).

    Args:
        latent: says whether sources are normalised.
        node: the one that hears.
        width: of its stream.
        widths: of the streams of all nodes.
    """

    def __init__(
        self, latent: LatentConfig, node: NodeConfig, width: int, widths: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.sources = node.hears
        form = BridgeConfig(start="default", normalize_source=latent.normalize)
        self.bridges = nn.ModuleDict(
            {name: Bridge(form, widths[name], width) for name in self.sources}
        )

    def said(self, written: Mapping[str, Tensor], shown: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what each source shows."""
        return {name: shown[name] for name in self.sources}

    def forward(self, said: Mapping[str, Tensor], heard_BTD: Tensor) -> Tensor:
        """Returns what is added, (B, T, D)."""
        added = torch.zeros_like(heard_BTD)
        for name, bridge in self.bridges.items():
            read_BTD = said[name].to(heard_BTD.device)[:, None].expand(-1, heard_BTD.shape[1], -1)
            added = added + bridge(read_BTD, heard_BTD)
        return added
