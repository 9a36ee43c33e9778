"""What an ensemble of processes costs in bytes and seconds: the model behind docs/scaling.md, as pure functions.

A pass is a race of processes. The anchor tells every specialist its part (an order), each process computes up to its
next site, sends its state to its targets, waits for its sources, and goes on; at the last site a specialist that meets
behind its last block waits for nobody. With c the compute between two sites, L the one-way latency and b a message's
seconds on the slowest link, process i leaves site k at

t_i(k) = max(t_i(k-1) + c_i(k), max over sources j of t_j(k-1) + c_j(k) + b + L),   t_anchor(0) = 0, t_i(0) = b + L.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rc_agents.topology import ANCHOR

STATE_HEADER = {"exact": 145, "bfloat16": 146, "int8": 175}
"""Bytes of a state's frame besides its tensors; a digit more or less in pass, site and shape."""

ORDER_HEADER = 470
"""Bytes of an order's frame besides names, edges and tensors."""

PAYLOAD = 1448 / 1514
"""Share of an Ethernet frame that is neither TCP's, IP's nor its own."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """How a process reaches the others.

    Args:
        up, down: bits a second that it can send and receive.
    """

    up: float = math.inf
    down: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One pass of an ensemble of processes.

    Args:
        compute: each model's seconds to its first site, from there to the second, and so on, and after the last; the
            anchor's first.
        edges: (source, target) pairs of names.
        widths: of each model's states.
        tokens: B x T of the pass, 1 for a decoded token.
        wire: how states cross.
        itemsize: bytes of a number of the models' own dtype.
        deaf: whether the last site lies behind the specialists' last blocks, so that they need not hear it.
        mask_columns: B x (P + T) where rows are padded, as the mask then crosses with every order.
        handling: seconds of a process's own for each frame that it sends or takes in, one after another.
    """

    compute: Mapping[str, Sequence[float]]
    edges: Sequence[tuple[str, str]]
    widths: Mapping[str, int]
    tokens: int = 1
    wire: str = "exact"
    itemsize: int = 4
    deaf: bool = True
    mask_columns: int = 0
    handling: float = 0.0

    @property
    def num_sites(self) -> int:
        """How often the models meet."""
        return len(self.compute[ANCHOR]) - 1

    def targets(self, source: str, site: int) -> list[str]:
        """Those that hear a model at a site."""
        last = self.deaf and site == self.num_sites - 1
        hearing = self._hearing.get(source, [])
        return [target for target in hearing if target == ANCHOR] if last else hearing

    @cached_property
    def touching(self) -> dict[str, list[tuple[str, str]]]:
        """Each model's edges, in and out."""
        found: dict[str, list[tuple[str, str]]] = {name: [] for name in self.compute}
        for edge in self.edges:
            for name in edge:
                found[name].append(edge)
        return found

    @cached_property
    def _hearing(self) -> dict[str, list[str]]:
        by_source: dict[str, list[str]] = {}
        for source, target in self.edges:
            by_source.setdefault(source, []).append(target)
        return by_source


def state_bytes(width: int, tokens: int, wire: str = "exact", itemsize: int = 4) -> int:
    """Bytes of one model's state at one site for one target.

    Args:
        width: D.
        tokens: B x T.
        wire: "exact" (`itemsize` bytes a number), "bfloat16" (2) or "int8" (1, and 4 a token for its scale).
        itemsize: of the model's own dtype.
    """
    token = {"exact": width * itemsize, "bfloat16": 2 * width, "int8": width + 4}[wire]
    return STATE_HEADER[wire] + tokens * token


def order_bytes(plan: Plan, name: str) -> int:
    """Bytes of what the anchor tells a specialist of a pass: its neighbours, its edges, and 16 a token.

    A pass that begins a text sends 8 a token where nobody has named positions.
    """
    edges = plan.touching[name]
    near = {name, *(one for edge in edges for one in edge)}
    others = near - {ANCHOR}
    names = sum(len(one) + 4 for one in near) + sum(len(one) + 7 for one in others)
    deaf = sum(len(one) + 4 for one in others) if plan.deaf else 0
    pairs = sum(len(a) + len(b) + 10 for a, b in edges)
    return ORDER_HEADER + names + deaf + pairs + 16 * plan.tokens + 8 * plan.mask_columns


def traffic(plan: Plan) -> dict[tuple[str, str], int]:
    """Bytes of one pass by (sender, receiver)."""
    sent = {(ANCHOR, name): order_bytes(plan, name) for name in plan.compute if name != ANCHOR}
    for site in range(plan.num_sites):
        for source in plan.compute:
            size = state_bytes(plan.widths[source], plan.tokens, plan.wire, plan.itemsize)
            for target in plan.targets(source, site):
                sent[source, target] = sent.get((source, target), 0) + size
    return sent


def messages(plan: Plan) -> int:
    """Frames of one pass, the orders among them."""
    states = sum(
        len(plan.targets(source, site)) for site in range(plan.num_sites) for source in plan.compute
    )
    return states + len(plan.compute) - 1


@dataclass
class Network:
    """Sends messages one after another through the ports of their two ends.

    Args:
        ports: by process; any process that is left out has all the bandwidth it wants.
        latency: seconds one way between any two.
    """

    ports: Mapping[str, Port]
    latency: float
    sent_until: dict[str, float] = field(default_factory=dict)
    heard_until: dict[str, float] = field(default_factory=dict)

    def deliver(self, source: str, target: str, ready: float, size: int) -> float:
        """Returns when a message that is ready at a time is there whole."""
        up, down = (
            8 * size / PAYLOAD / rate for rate in (self._port(source).up, self._port(target).down)
        )
        leaves = max(ready, self.sent_until.get(source, 0.0))
        self.sent_until[source] = leaves + up
        begins = max(leaves + self.latency, self.heard_until.get(target, 0.0))
        self.heard_until[target] = begins + down
        return max(begins + down, leaves + up + self.latency)

    def _port(self, name: str) -> Port:
        return self.ports.get(name, Port())


def pass_seconds(
    plan: Plan, ports: Mapping[str, Port] | None = None, latency: float = 0.0
) -> float:
    """Seconds from the anchor's order to its logits.

    Args:
        plan: who computes what and who hears whom.
        ports: by process; unlimited where left out.
        latency: seconds one way between any two processes.
    """
    network, own = Network(ports or {}, latency), plan.handling
    clock = {ANCHOR: 0.0}
    for name in plan.compute:
        if name != ANCHOR:
            clock[ANCHOR] += own
            there = network.deliver(ANCHOR, name, clock[ANCHOR], order_bytes(plan, name))
            clock[name] = there + own
    for site in range(plan.num_sites):
        clock = {name: clock[name] + plan.compute[name][site] for name in plan.compute}
        heard: dict[str, list[float]] = {name: [] for name in plan.compute}
        for source in sorted(clock, key=clock.__getitem__):
            size = state_bytes(plan.widths[source], plan.tokens, plan.wire, plan.itemsize)
            for target in plan.targets(source, site):
                clock[source] += own
                heard[target].append(network.deliver(source, target, clock[source], size))
        for name, times in heard.items():
            for there in sorted(times):
                clock[name] = max(clock[name], there) + own
    return clock[ANCHOR] + plan.compute[ANCHOR][-1]


def spread(seconds: float, depths: Sequence[float], head: float = 0.0) -> list[float]:
    """Returns a model's seconds up to each site and after the last.

    Args:
        seconds: of its whole pass.
        depths: the sites, as shares of its blocks.
        head: share of its pass that comes after its last block.
    """
    blocks = seconds * (1 - head)
    steps = [b - a for a, b in zip([0.0, *depths], [*depths, 1.0], strict=True)]
    return [*(blocks * step for step in steps[:-1]), blocks * steps[-1] + seconds * head]
