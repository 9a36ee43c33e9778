"""What goes through a graph: where its nodes' states come from, what they say, and what is answered.

Shapes: B texts, T tokens, S nodes heard, N nodes read, K choices, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .frozen import Batch, EncoderNode, FrozenNode, Hear
from .remote import RemoteNode

Node = FrozenNode | EncoderNode | RemoteNode


class Run(Protocol):
    """Where a node's states come from: its model, or what was kept of an earlier pass."""

    @property
    def rows(self) -> int:
        """Texts, B."""

    def states(self, name: str, hear: Hear | None) -> tuple[Tensor, Tensor]:
        """Returns a node's states (B, T, D) behind the block it is read at, and which are real (B, T)."""


@dataclass
class WholeRun:
    """Every node's model runs.

    Args:
        nodes: by name.
        batches: what each reads.
    """

    nodes: Mapping[str, Node]
    batches: Mapping[str, Batch]

    @property
    def rows(self) -> int:
        """See `Run`."""
        batch = next(iter(self.batches.values()))
        return next(len(one) for one in batch.values() if isinstance(one, (Tensor, list)))

    def states(self, name: str, hear: Hear | None) -> tuple[Tensor, Tensor]:
        """See `Run`."""
        grad = torch.is_grad_enabled() and hear is not None
        with torch.set_grad_enabled(grad):
            return self.nodes[name].states(self.batches[name], hear)


@dataclass
class Signals:
    """What went through a graph.

    Attributes:
        shown: by node, the pooled state that it was read as, (B, D).
        written: by node that is heard, its state in the latent space, (B, D_latent).
        latent: by node that hears, the aggregate that reached it, (B, D_latent).
        weights: by node that hears, how much each node it hears weighed, (B, S).
        lost: by node in another process that could not be reached and showed nothing (zeros), why.
    """

    shown: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)
    latent: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


@dataclass
class GraphOutput:
    """What a graph answers.

    Attributes:
        logits: scores of the choices (B, K), or of the vocabulary (B, T, V).
        routing: the output's weights over the nodes that it reads, (B, heads, K or T, N).
        signals: what went through the graph.
        loss: cross-entropy in nats, where labels were given.
    """

    logits: Tensor
    routing: Tensor
    signals: Signals
    loss: Tensor | None = None
