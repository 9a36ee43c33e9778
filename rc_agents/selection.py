"""Which specialists speak, and how loudly: per call and per row of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, nearest
from .topology import ANCHOR, Edge

_CUT: ContextVar[Mapping[int, frozenset[str]]] = ContextVar(
    "rc_agents_cut", default=MappingProxyType({})
)


_CALL: ContextVar[tuple[object, Choice] | None] = ContextVar("rc_agents_call", default=None)


@contextmanager
def during(owner: object, choice: Choice) -> Iterator[None]:
    """Makes `choice` that of every pass of `owner` inside the block that names none itself.

    A logits processor that calls the model by itself, as guidance does, passes on nothing of what `generate` got.
    """
    token = _CALL.set((owner, choice))
    try:
        yield
    finally:
        _CALL.reset(token)


def of_call(owner: object, batch: int) -> Choice | None:
    """Returns the choice of the call around a pass of `batch` rows, its rows repeated where the call repeats them."""
    call = _CALL.get()
    if call is None or call[0] is not owner or call[1].presence is None:
        return None
    copies, rest = divmod(batch, len(call[1].presence))
    if rest:
        return None
    rows = [
        part if part is None else part.repeat_interleave(copies, 0)
        for part in (call[1].strength, call[1].presence)
    ]
    return Choice(call[1].edges, call[1].names, *rows)


@contextmanager
def cut(owner: object, names: Sequence[str]) -> Iterator[None]:
    """Cuts models out of `owner`'s exchange inside the block, in this thread and context only."""
    current = _CUT.get()
    token = _CUT.set({**current, id(owner): current.get(id(owner), frozenset()) | set(names)})
    try:
        yield
    finally:
        _CUT.reset(token)


def cut_names(owner: object) -> frozenset[str]:
    """Returns the models that are cut out of `owner`'s exchange here."""
    return _CUT.get().get(id(owner), frozenset())


def check_names(names: Any, known: Sequence[str]) -> list[str]:
    """Raises `InputError` unless `names` is a list of specialists' names; returns it without the anchor."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"specialists is a list of names (or one list a row), got {names!r}")
    for name in names:
        if name not in known:
            raise InputError(
                f"unknown specialist {name!r}; {nearest(str(name), [n for n in known if n != ANCHOR])}"
            )
    return [name for name in names if name != ANCHOR]


@dataclass(frozen=True)
class Choice:
    """Which specialists take part in each row of a batch, and how loudly each edge speaks.

    Args:
        edges: all edges of the ensemble.
        names: all its models.
        strength: factor of every edge in every row, (B, E); None where all are one.
        presence: whether each model takes part in each row, (B, N); None where all do.
    """

    edges: Sequence[Edge]
    names: Sequence[str]
    strength: Tensor | None = None
    presence: Tensor | None = None

    def uses(self, edge: Edge) -> bool:
        """Whether some row hears this edge."""
        factor = self.factor(edge)
        return factor is None or bool(factor.any())

    def factor(self, edge: Edge) -> Tensor | None:
        """Returns an edge's factor in every row, (B,); None where all are one."""
        if self.strength is None:
            return None
        factor = self.strength[:, self.edges.index(edge)]
        return None if bool((factor == 1).all()) else factor

    def present(self) -> dict[str, Tensor] | None:
        """Returns whether each model takes part in each row, (B,) by name; None where all do."""
        if self.presence is None:
            return None
        return dict(zip(self.names, self.presence.bool().unbind(1), strict=True))

    def takes_part(self, name: str) -> bool:
        """Whether a model takes part in some row."""
        return self.presence is None or bool(self.presence[:, self.names.index(name)].any())


def choose(
    edges: Sequence[Edge],
    names: Sequence[str],
    batch: int,
    specialists: Any = None,
    strength: Any = None,
) -> Choice:
    """Checks what a call says about who speaks.

    Args:
        edges: all edges of the ensemble; none for a router.
        names: all models, the anchor first.
        batch: rows, B.
        specialists: None (all), a list of names, or one such list (or None) a row. A specialist that is not chosen has
            its edges cut in and out, and no say in the mixed output.
        strength: factor of every bridge's update: a number, a dict by specialist (its edges outward), or one of
            either a row.

    Raises:
        InputError: unknown names, wrong counts, or a strength that is no finite number.
    """
    if specialists is None and strength is None:
        return Choice(edges, names)
    if strength is not None and not edges and len(names) > 1:
        raise InputError("strength scales bridges, and this ensemble has none; choose specialists=")
    chosen = _per_row(specialists, batch, "specialists", _is_rows_of_names)
    factors = _per_row(strength, batch, "strength", _is_rows_of_factors)
    present = [set(names if p is None else [ANCHOR, *check_names(p, names)]) for p in chosen]
    rows = [
        [_factor(edge, factor, names) if on.issuperset(edge) else 0.0 for edge in edges]
        for on, factor in zip(present, factors, strict=True)
    ]
    return Choice(
        edges,
        names,
        torch.tensor(rows, dtype=torch.float32).reshape(batch, len(edges)),
        torch.tensor([[name in on for name in names] for on in present]),
    )


def _is_rows_of_factors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() > 0)


def _is_rows_of_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(not isinstance(entry, str) for entry in value)


def _per_row(value: Any, batch: int, what: str, is_rows: Any) -> list[Any]:
    if not is_rows(value):
        return [value] * batch
    rows = value.tolist() if isinstance(value, Tensor) else list(value)
    if len(rows) != batch:
        raise InputError(f"{what} has {len(rows)} entries for a batch of {batch} rows")
    return rows


def _factor(edge: Edge, strength: Any, names: Sequence[str]) -> float:
    if isinstance(strength, Mapping):
        check_names(list(strength), names)
        strength = strength.get(edge.source, 1.0)
    value = 1.0 if strength is None else strength
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"strength is a finite number, got {strength!r}")
    return float(value)
