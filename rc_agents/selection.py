"""Which specialists speak, and how loudly: per call and per row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, nearest
from .topology import ANCHOR, Edge

_CUT: ContextVar[Mapping[int, frozenset[str]]] = ContextVar("rc_agents_cut", default={})


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
            raise InputError(f"unknown specialist {name!r}; {nearest(str(name), [n for n in known if n != ANCHOR])}")
    return [name for name in names if name != ANCHOR]


def edge_strengths(
    edges: Sequence[Edge],
    names: Sequence[str],
    batch: int,
    specialists: Any = None,
    strength: Any = None,
) -> Tensor | None:
    """Returns the factor of every edge in every row, (B, E); None when all are one.

    Args:
        edges: all edges of the ensemble.
        names: all models.
        batch: rows, B.
        specialists: None (all), a list of names, or one such list (or None) a row. A specialist that is not chosen has
            its edges cut in and out.
        strength: factor of every bridge's update: a number, a dict by specialist (its edges outward), or one of
            either a row.

    Raises:
        InputError: unknown names, wrong counts, or a strength that is no finite number.
    """
    if specialists is None and strength is None:
        return None
    chosen = _per_row(specialists, batch, "specialists", _is_rows_of_names)
    factors = _per_row(strength, batch, "strength", lambda value: isinstance(value, (list, tuple, Tensor)))
    rows = []
    for picked, factor in zip(chosen, factors, strict=True):
        on = set(names if picked is None else [ANCHOR, *check_names(picked, names)])
        rows.append([_factor(edge, factor, names) if on.issuperset(edge) else 0.0 for edge in edges])
    return torch.tensor(rows, dtype=torch.float32).reshape(batch, len(edges))


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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not torch.isfinite(torch.tensor(float(value))):
        raise InputError(f"strength is a finite number, got {strength!r}")
    return float(value)
