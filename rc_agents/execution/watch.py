"""A look at the gates while a pass runs: who is heard at its last token. B rows, T tokens, D width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..sparse import Sparse
from ..topology import ANCHOR, Edge
from .coupled_pass import CoupledPass
from .protocol import Meet, Schedule, Stream

Rows = dict[str, Tensor]
"""Specialist -> in which rows, (B,), on the CPU."""


@dataclass
class Watch:
    """Reads every gate at the last token of each row, wherever the models meet.

    Of a source that sleeps it takes the state that it showed last before it did: what its gates would say now is told
    by their targets, which run, and guessed as far as they read the source.

    Args:
        whole: the pass as it would be if nobody slept.
        sleepers: the specialists that may sleep.
        asleep: who sleeps, in which rows.
        settings: when somebody sleeps, and is woken.
    """

    whole: CoupledPass
    sleepers: Sequence[str]
    asleep: Rows
    settings: Sparse
    gates: list[tuple[Edge, Tensor]] = field(default_factory=list, init=False)
    traces: dict[str, dict[int, Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.edges = [edge for edge in self.whole.edges if edge.source in self.sleepers]
        self.last = _last_columns(self.whole)

    def around(self, schedule: Schedule) -> Schedule:
        """Returns the schedule with a look at every site."""

        def run(streams: Sequence[Stream], num_sites: int, meet: Meet) -> dict[str, Any]:
            def watched(site: int, states: dict[str, Tensor]) -> Mapping[str, Tensor]:
                self._look(site, states)
                return meet(site, states)

            return schedule(streams, num_sites, watched)

        return run

    @torch.no_grad()
    def _look(self, site: int, states: dict[str, Tensor]) -> None:
        for name in {edge.source for edge in self.edges}:
            self._trace(name, site, states.get(name))
        for edge in self.edges:
            if edge.target not in states or site not in self.traces[edge.source]:
                continue
            target = self._at_last(states[edge.target])
            source = self.traces[edge.source][site].to(target.device)
            gate = self.whole.ensemble.bridge(edge, site).openness(source, target)
            self.gates.append((edge, gate))

    def _trace(self, name: str, site: int, state_BTD: Tensor | None) -> None:
        """Keeps what a source shows, in the rows where it is awake, and what it showed last in the others."""
        sites = self.traces.setdefault(name, {})
        before = self.whole.memory.traces.get(name, {}).get(site)
        shown = None if state_BTD is None else self._at_last(state_BTD).clone()
        if shown is not None and name in self.asleep and before is not None:
            shown = torch.where(self.asleep[name].to(shown.device)[:, None, None], before, shown)
        found = before if shown is None else shown
        if found is not None:
            sites[site] = found

    def _at_last(self, state_BTD: Tensor) -> Tensor:
        if self.last is None:
            return state_BTD[:, -1:]
        rows = torch.arange(len(state_BTD), device=state_BTD.device)
        return state_BTD[rows, self.last.to(state_BTD.device)][:, None]

    def heard(self) -> Rows:
        """Returns in which rows each specialist is heard, or would be as far as its gates tell while it sleeps."""
        num_rows = len(self.whole.input_ids)
        found = {edge.source: torch.zeros(num_rows, dtype=torch.bool) for edge in self.edges}
        for edge, gate in self.gates:
            rows = in_use(self.whole, edge) & self._is_open(edge, gate.reshape(-1).cpu())
            if edge.target in self.asleep:
                rows = rows & ~self.asleep[edge.target]
            found[edge.source] = found[edge.source] | rows
        return found

    def _is_open(self, edge: Edge, gate_B: Tensor) -> Tensor:
        form = self.whole.ensemble.bridge(edge, 0).gate
        known = (gate_B >= form.floor) & (gate_B > self.settings.threshold)
        if edge.source not in self.asleep or not form.reads_source:
            return known
        return torch.where(self.asleep[edge.source], gate_B > self.settings.wake, known)

    def woken(self, heard: Rows, unsure: Tensor) -> Rows:
        """Returns who sleeps and is called, or may have something to say where the others are unsure."""
        called: Rows = {}
        for name, rows in self.asleep.items():
            asked = heard.get(name, torch.zeros_like(rows))
            for edge in self.edges:
                if edge.source == name and not self._follows_target(edge):
                    asked = asked | (unsure & in_use(self.whole, edge))
            if (rows & asked).any():
                called[name] = rows & asked
        return called

    def _follows_target(self, edge: Edge) -> bool:
        """Whether the gates of an edge follow the text by its target alone, so that nothing is guessed."""
        gate = self.whole.ensemble.bridge(edge, 0).gate
        return gate.reads_target and not gate.reads_source

    def sleepy(self, heard: Rows) -> Rows:
        """Returns who sleeps from here on: whoever was not heard."""
        return {name: ~rows for name, rows in heard.items() if not rows.all()}


def unsure(logits_BTV: Tensor, certainty: float) -> Tensor:
    """Returns in which rows no next token is more probable than `certainty`, (B,)."""
    last_BV = logits_BTV[:, -1].detach().float()
    likeliest = (last_BV.max(-1).values - last_BV.logsumexp(-1)).exp()
    return (likeliest <= certainty).cpu()


def in_use(step: CoupledPass, edge: Edge) -> Tensor:
    """Returns in which rows an edge is on, (B,)."""
    factor = step.choice.factor(edge)
    if factor is None:
        return torch.ones(len(step.input_ids), dtype=torch.bool)
    return factor.cpu() != 0


def heard_rows(step: CoupledPass, sleepers: Sequence[str]) -> Rows:
    """Returns in which rows each of these specialists has an edge that is on."""
    found: Rows = {}
    for edge in step.edges:
        if edge.source in sleepers:
            rows = in_use(step, edge)
            found[edge.source] = found.get(edge.source, torch.zeros_like(rows)) | rows
    return found


def may_sleep(ensemble: Any) -> list[str]:
    """Returns the specialists that can sleep: those that share the anchor's tokens with all whom they meet."""
    own = set(ensemble.config.span_names)
    met = {name for edge in ensemble.edges if own & set(edge) for name in edge}
    return [name for name in ensemble.names if name not in {ANCHOR, *own, *met}]


def _last_columns(step: CoupledPass) -> Tensor | None:
    """Returns the last real column of each row of the pass, (B,); None where it is the last one in all."""
    if step.mask is None or step.input_ids.shape[1] == 1:
        return None
    real_BT = step.mask[:, step.past :].bool()
    if real_BT[:, -1].all():
        return None
    places = torch.arange(1, real_BT.shape[1] + 1, device=real_BT.device)
    return ((real_BT * places).amax(1) - 1).clamp(min=0).cpu()
