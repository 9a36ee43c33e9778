"""What happens when the models meet: gather what each edge reads, then write all targets at once.

h_i <- h_i + sum_j s_ij gate_ij W_ij n(h_j); every source is read before any target is written (simultaneous).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..bridges import Router
from ..cache import CoupledCache
from ..errors import ModelRunError
from ..topology import Edge

BridgeOf = Callable[[Edge, int], nn.Module]


@dataclass
class Exchange:
    """One pass's exchange.

    Args:
        edges: the edges that are on.
        bridge: (edge, site) -> the module that maps (source, target) states to an update.
        strength: edge -> factor, (B,) where rows differ; edges at full strength are left out.
        reads: edge -> slot of the source that each target token reads, (B, T_target), -1 for none; edges whose
            positions coincide are left out.
        memory: keeps what sources showed in earlier steps, for edges in `reads`.
    """

    edges: Sequence[Edge]
    bridge: BridgeOf
    strength: Mapping[Edge, Tensor] = field(default_factory=dict)
    reads: Mapping[Edge, Tensor] = field(default_factory=dict)
    memory: CoupledCache | None = None

    def __call__(self, site: int, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Maps the states of the models that run, (B, T_i, D_i) by name, to the updated ones."""
        shown = self._show(site, states)
        updated = dict(states)
        for edge in self.edges:
            if edge.target not in states:
                continue
            target = states[edge.target]
            try:
                update = self.bridge(edge, site)(self._source(edge, states, shown, target), target)
            except Exception as error:
                raise ModelRunError(
                    f"bridge {edge.source!r} -> {edge.target!r} failed at site {site}: {type(error).__name__}: {error}"
                ) from error
            if edge in self.strength:
                update = update * self.strength[edge].to(update.device, update.dtype)[:, None, None]
            updated[edge.target] = updated[edge.target] + update
        return updated

    def _show(self, site: int, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds this step's states to the memory of every source that is read by slot."""
        shown: dict[str, Tensor] = {}
        for source in {edge.source for edge in self.reads}:
            assert self.memory is not None
            if source in states:
                shown[source] = self.memory.show(source, site, states[source])
            elif site in self.memory.histories.get(source, {}):
                shown[source] = self.memory.histories[source][site]
        return shown

    def _source(self, edge: Edge, states: dict[str, Tensor], shown: dict[str, Tensor], target: Tensor) -> Tensor:
        """The source's states at the target's positions, (B, T_target, D_source), on the target's device."""
        if edge not in self.reads:
            return states[edge.source].to(target.device)
        index = self.reads[edge].to(shown[edge.source].device)
        history = shown[edge.source]
        picked = history.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, history.shape[-1]))
        return picked.masked_fill((index < 0)[..., None], 0).to(target.device)


@dataclass
class RoutedExchange:
    """The mixture-of-experts exchange: a router a site replaces every stream by one fused state."""

    router: Callable[[int], Router]
    names: Sequence[str]

    def __call__(self, site: int, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Exchange.__call__`; models that are cut stay as they are."""
        taking_part = {name: states[name] for name in self.names if name in states}
        if len(taking_part) < 2:
            return states
        try:
            return states | self.router(site)(taking_part)
        except Exception as error:
            raise ModelRunError(f"router failed at site {site}: {type(error).__name__}: {error}") from error


def keep(site: int, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """The exchange in which nobody speaks: every state stays as it is, bit for bit."""
    return states


def as_index(rows: Sequence[Sequence[int]]) -> Tensor:
    """Pads lists of slots to a (B, T) index with -1."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *([-1] * (width - len(row)))] for row in rows], dtype=torch.long)
