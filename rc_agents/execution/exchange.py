"""What happens when the models meet: gather what each edge reads, then write all targets at once.

h_i <- h_i + sum_j s_ij gate_ij W_ij n(h_j); every source, and by the gates every target, is read before any target is
written (simultaneous). Of several blends into one target the later edge, in order of addition, has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Encoded
from ..bridges import Router
from ..cache import CoupledCache
from ..errors import ModelRunError
from ..topology import Edge
from .copies import carried, marks
from .span import SpanPlan

BridgeOf = Callable[[Edge, int], nn.Module]


@dataclass
class Exchange:
    """One pass's exchange.

    Args:
        edges: the edges that are on.
        bridge: (edge, site) -> the module that maps (source, target) states to an update.
        strength: edge -> factor, (B,) where rows differ; edges at full strength are left out.
        spans: how the tokens of models with their own tokenizer lie beside the anchor's.
        memory: keeps what sources showed at the anchor's columns in earlier steps, for such models.
    """

    edges: Sequence[Edge]
    bridge: BridgeOf
    strength: Mapping[Edge, Tensor] = field(default_factory=dict)
    spans: SpanPlan = field(default_factory=SpanPlan)
    memory: CoupledCache | None = None
    ready: Mapping[str, Any] = field(default_factory=dict, init=False)

    def __call__(self, site: int, states: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Maps the states of the models that run, (B, T_i, D_i) by name, to the updated ones.

        An updated state is computed when it is asked for, so that each model's thread can do its own.
        """
        self.ready = marks(states)
        return Updated(self, site, states, self._show(site, states))

    def update(
        self, site: int, states: dict[str, Tensor], shown: dict[str, Tensor], name: str
    ) -> Tensor:
        """Returns one model's state after what it hears at this site, (B, T, D)."""
        target = updated = states[name]
        for edge in self.edges:
            if edge.target != name or edge.source not in states | shown:
                continue
            try:
                source = self._source(edge, site, states, shown, target)
                update = self.bridge(edge, site)(source, target, updated)
            except Exception as error:
                raise ModelRunError(
                    f"bridge {edge.source!r} -> {edge.target!r} failed at site {site}: {type(error).__name__}: {error}"
                ) from error
            if edge in self.strength:
                factor = self.strength[edge].to(update.device, update.dtype)[:, None, None]
                update = (update * factor).masked_fill(factor == 0, 0)  # 0 * inf is no silence
            updated = updated + update
        return updated

    def _show(self, site: int, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns what each source of or for a model with its own tokenizer shows at all columns so far.

        An encoder shows all its positions, (B, S, D).
        """
        shown = {name: encoded.states[site] for name, encoded in self._encoded.items()}
        own = self.spans.picks
        asked = {edge.source for edge in self.edges if not own.keys().isdisjoint(edge)}
        for source in asked - shown.keys():
            assert self.memory is not None
            pool = self.memory.shown_before(source, site, states.get(source))
            if pool is not None and source in own:
                past = pool[:, : self.memory.length]
                pool = torch.cat([past, picked(pool, own[source])], dim=1)
            if pool is not None:
                shown[source] = self.memory.histories.setdefault(source, {})[site] = pool
        return shown

    @property
    def _encoded(self) -> Mapping[str, Encoded]:
        return {} if self.memory is None else self.memory.encoded

    def _source(
        self,
        edge: Edge,
        site: int,
        states: dict[str, Tensor],
        shown: dict[str, Tensor],
        target: Tensor,
    ) -> Tensor:
        """The source's states at the target's positions, (B, T_target, D_source), on the target's device."""
        if edge.source in self._encoded:
            mask = self._encoded[edge.source].mask.to(target.device)
            pool: Any = self.bridge(edge, site).pool
            return pool(carried(shown[edge.source], target.device), mask, target)
        if edge.target in self.spans.reads:
            return carried(picked(shown[edge.source], self.spans.reads[edge.target]), target.device)
        if edge.source in self.spans.picks:
            return carried(shown[edge.source][:, -target.shape[1] :], target.device)
        return carried(states[edge.source], target.device, self.ready.get(edge.source))


@dataclass
class Updated(Mapping[str, Tensor]):
    """The states after an exchange, by name; every source is as it was before it (simultaneous)."""

    exchange: Exchange
    site: int
    states: dict[str, Tensor]
    shown: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.exchange.update(self.site, self.states, self.shown, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)


def picked(states: Tensor, index: Tensor) -> Tensor:
    """Returns the states (B, P, D) at an index (B, T), zero where it is -1: (B, T, D)."""
    index = index.to(states.device)[..., None]
    found = states.gather(1, index.clamp(min=0).expand(-1, -1, states.shape[-1]))
    return found.masked_fill(index < 0, 0)


EXCHANGE: ContextVar[Callable[..., Exchange]] = ContextVar("rc_agents_exchange", default=Exchange)
"""What a pass builds its exchange with; a warm start puts a recorder here."""


@dataclass
class RoutedExchange:
    """The mixture-of-experts exchange: a router a site replaces every stream by one fused state.

    Args:
        routers: one a site.
        names: the models that take part in some row.
        presence: whether each of the ensemble's models takes part in each row, (B, N); None where all do.
    """

    routers: Sequence[Router] | nn.ModuleList
    names: Sequence[str]
    presence: Mapping[str, Tensor] | None = None

    def __call__(self, site: int, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Exchange.__call__`; models that do not take part stay as they are."""
        taking_part = {name: states[name] for name in self.names if name in states}
        if len(taking_part) < 2:
            return states
        try:
            return states | self.routers[site](taking_part, self.presence)
        except Exception as error:
            raise ModelRunError(
                f"router failed at site {site}: {type(error).__name__}: {error}"
            ) from error


def keep(site: int, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """The exchange in which nobody speaks: every state stays as it is, bit for bit."""
    return states
