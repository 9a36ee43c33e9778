"""A pass whose models run in several processes, seen from one of them: send at each site, then hear, then go on.

Every process sends its state to the targets of its edges before it waits for its sources', so none waits in a circle.
Gradients go back the same way: autograd runs a process's sites in reverse, and at each it sends what its sources are
owed before it waits for what its targets owe. B rows, T tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..topology import Edge
from .protocol import check_order, missed
from .rank import Rank
from .wire import DTYPES, Frame, LinkError, packed, unpacked

OUTPUT = -1
"""Stands for a site where a model's logits cross to the anchor."""


@dataclass
class Crossing:
    """One pass, as one process takes part in it.

    Args:
        rank: the process.
        number: of the pass, rising.
        present: the models that run in it.
        edges: the edges that are on, in the ensemble's order.
        num_sites: how often the models meet.
        exchange: (site, states by name) -> updated states by name, of which this process asks for its own model's.
        limit: seconds that each wait may take.
        wire: how states cross, one of `wire.WIRES`.
        deaf: the models that need not hear anybody at the last site.
        widths: of the models' streams, by name.
        own_tokens: the models with their own tokenizers, whose states have positions of their own.
    """

    rank: Rank
    number: int
    present: Sequence[str]
    edges: Sequence[Edge]
    num_sites: int
    exchange: Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]]
    limit: float
    wire: str = "exact"
    deaf: Sequence[str] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    own_tokens: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        me = self.rank.name
        self.sources = list(
            dict.fromkeys(
                e.source for e in self.edges if e.target == me and e.source in self.present
            )
        )
        self.targets = list(
            dict.fromkeys(
                e.target for e in self.edges if e.source == me and e.target in self.present
            )
        )
        self.reached = 0
        self.last: Tensor | None = None

    def arrive(self, site: int, hidden: Tensor) -> Tensor:
        """What the local model's taps call: its state at a site, (B, T, D), for the one it goes on with."""
        check_order(self.rank.name, site, self.reached)
        self.reached += 1
        last = site == self.num_sites - 1
        hearing = [name for name in self.targets if not (last and name in self.deaf)]
        states = {self.rank.name: self.show(site, hidden, hearing)}
        if last and self.rank.name in self.deaf:
            self.last = states[self.rank.name]
            return self.last
        begun = time.monotonic()  # one deadline for all that are heard here
        for source in self.sources:
            states[source] = self.hear(source, site, begun, hidden)
        self.last = self.exchange(site, states)[self.rank.name]
        return self.last

    def check_ended(self) -> None:
        """Raises `ModelRunError` where the local model has missed a site."""
        if self.reached != self.num_sites:
            raise missed(self.rank.name, self.reached)

    def _check(self, source: str, site: int, state: Tensor, beside: Tensor | None) -> None:
        """Raises `LinkError` for a state of another shape than the source's at this site."""
        shape = list(state.shape)
        if beside is None:
            return
        expected = [beside.shape[0], beside.shape[1], self.widths.get(source, shape[-1])]
        if self.own_tokens.intersection((source, self.rank.name)) and len(shape) == 3:
            expected[1] = shape[1]
        if shape != expected:
            raise LinkError(f"a state of shape {shape} at site {site}, expected {expected}")

    def show(self, site: int, hidden: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Sends a state to the targets; returns it, tied to the gradients that they owe for it."""
        targets = self.targets if targets is None else targets
        if not targets:
            return hidden
        owed = hidden.requires_grad and torch.is_grad_enabled()
        wire = "exact" if site == OUTPUT else self.wire
        fields = {
            "pass": self.number,
            "site": site,
            "grad": owed,
            "dtype": str(hidden.dtype).removeprefix("torch."),
        }
        frame = Frame("state", fields, packed(hidden.detach(), wire))
        for target in targets:
            self.rank.send(target, frame)
        if not owed:
            return hidden
        shown: Tensor = _Shown.apply(hidden, self, site, tuple(targets))  # type: ignore[no-untyped-call]
        return shown

    def hear(
        self, source: str, site: int, begun: float | None = None, beside: Tensor | None = None
    ) -> Tensor:
        """Returns another model's state at a site, waited for since `begun`; it must fit the one `beside` it."""
        frame = self.rank.wait((source, "state", self.number, site), self.limit, begun)
        try:
            state = unpacked(frame.tensors, DTYPES[frame.fields["dtype"]])
            self._check(source, site, state, beside)
        except (LinkError, KeyError, RuntimeError) as error:
            self.rank.broke(source, LinkError(f"{source!r} sent no state: {error}"))
            raise
        if not (frame.fields["grad"] and torch.is_grad_enabled()):
            return state
        if site == OUTPUT:
            return state.requires_grad_()  # `ended` sends its gradient back
        leaf = torch.zeros((), requires_grad=True)
        heard: Tensor = _Heard.apply(leaf, state, self, site, source)  # type: ignore[no-untyped-call]
        return heard

    def ended(self, own: Tensor, heard: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Ties the anchor's logits to those that others sent, so that each of these gets its gradient, or word of none.

        Args:
            own: the anchor's logits.
            heard: by name.

        Returns:
            The same.
        """
        tied = [name for name, logits in heard.items() if logits.requires_grad]
        if not (torch.is_grad_enabled() and (tied or own.requires_grad)):
            return own, dict(heard)
        logits = [own, *(heard[name] for name in tied)]
        first, *rest = _Ends.apply(self, tied, *logits)  # type: ignore[no-untyped-call]
        return first, {**heard, **dict(zip(tied, rest, strict=True))}

    def owe(self, source: str, site: int, grad: Tensor | None) -> None:
        """Sends a state's gradient back, None for none."""
        fields = {"pass": self.number, "site": site}
        self.rank.send(source, Frame("grad", fields, {} if grad is None else {"grad": grad}))


class _Ends(torch.autograd.Function):
    """The identity on all logits of a pass; going back, none is left out, whatever the loss is made of."""

    @staticmethod
    def forward(ctx: Any, crossing: Crossing, names: Sequence[str], *logits: Tensor) -> Any:
        ctx.crossing, ctx.names = crossing, names
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits[0])
        return tuple(one.view_as(one) for one in logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        crossing = ctx.crossing
        crossing.rank.backward_begins(crossing.number, crossing.present)
        for name, grad in zip(ctx.names, grads[1:], strict=True):
            crossing.owe(name, OUTPUT, grad)
        own = torch.zeros_like(ctx.saved_tensors[0]) if grads[0] is None else grads[0]
        return None, None, own, *(None for _ in ctx.names)


class _Shown(torch.autograd.Function):
    """The identity; going back, it adds the gradients of the processes that were shown the state."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, crossing: Crossing, site: int, targets: Sequence[str]
    ) -> Tensor:
        ctx.crossing, ctx.site, ctx.targets = crossing, site, targets
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        total, crossing = grads[0], ctx.crossing
        crossing.rank.backward_begins(crossing.number, crossing.present)
        for target in ctx.targets:
            key = (target, "grad", crossing.number, ctx.site)
            owed = crossing.rank.wait(key, crossing.limit).tensors.get("grad")
            total = total if owed is None else total + owed.to(total)
        return total, None, None, None


class _Heard(torch.autograd.Function):
    """A state that came from another process; going back, its gradient returns there."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, state: Tensor, crossing: Crossing, site: int, source: str
    ) -> Tensor:
        ctx.crossing, ctx.site, ctx.source = crossing, site, source
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None, None]:
        crossing = ctx.crossing
        crossing.rank.backward_begins(crossing.number, crossing.present)
        crossing.owe(ctx.source, ctx.site, grads[0])
        return None, None, None, None, None
