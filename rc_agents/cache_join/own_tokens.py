"""Joins what models with their own tokenizer have read, and what sources have shown at the anchor's columns."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache

from ..alignment import Clock, Row, SpanText
from .parts import Part, rows, widened


def texts(parts: Sequence[Part], length: int) -> dict[str, SpanText]:
    """Returns the running tokenization of each model that has read some part in its own tokens, by name.

    Rows that it has not read begin with its next pass.

    Args:
        parts: of the anchor's columns.
        length: the anchor's columns in the joined cache.
    """
    names = sorted({name for part in parts for name in part.cache.texts})
    return {name: _text(name, parts, length) for name in names}


def _text(name: str, parts: Sequence[Part], length: int) -> SpanText:
    pattern = next(part.cache.texts[name] for part in parts if name in part.cache.texts)
    made = SpanText(pattern.tree, [], [])
    for part in parts:
        if name in part.cache.texts:
            moved = part.cache.texts[name].copy()
            moved.select(part.rows.tolist())
            moved.shift(length - part.cache.length)
        else:
            moved = SpanText(pattern.tree, [Row(pattern.rows[0].segments)], [Clock()])
            moved.select([0] * len(part.rows))
        made.rows += moved.rows
        made.clocks += moved.clocks
    return made


def cache(name: str, parts: Sequence[Part], text: SpanText) -> Cache:
    """Returns a model's cache of all rows: of each the slots that still hold, from the first one on.

    A model that cannot branch gets an empty one: it reads its rows anew, as it does in every batch.

    Args:
        name: the model's.
        parts: of the anchor's columns.
        text: what `texts` gave; changed in place.
    """
    held = [list(row.slots) if text.tree else [] for row in text.rows]
    text.num_slots = max(map(len, held))
    for row, slots in zip(text.rows, held, strict=True):
        row.slots = list(range(len(slots)))
    if not text.num_slots:
        return DynamicCache()
    index = torch.tensor([slots + [0] * (text.num_slots - len(slots)) for slots in held])  # (B, K)
    each = index.split([len(part.rows) for part in parts])
    begun = [name in part.cache.texts and part.cache.texts[name].num_slots > 0 for part in parts]
    caches = [
        part.cache.caches[name] if has else None for part, has in zip(parts, begun, strict=True)
    ]
    made = copy.copy(next(one for one in caches if one is not None))
    made.layers = [copy.copy(layer) for layer in made.layers]

    def slots_of(states: Tensor, place: int) -> Tensor:
        """(R, heads, columns, D) -> (R, heads, K, D); what lies beyond a row's own slots is masked."""
        return states.take_along_dim(each[place].to(states.device)[:, None, :, None], 2)

    for number, layer in enumerate(made.layers):
        for kind in ("keys", "values") if layer.is_initialized else ():
            states = [None if one is None else getattr(one.layers[number], kind) for one in caches]
            setattr(layer, kind, rows(states, parts, slots_of))
    return made


def histories(parts: Sequence[Part], length: int) -> dict[str, dict[int, Tensor]]:
    """Returns what each source showed at the anchor's columns, (B, length, width), zeros where it showed nothing."""
    made: dict[str, dict[int, Tensor]] = {}
    for source in sorted({name for part in parts for name in part.cache.histories}):
        each = [part.cache.histories.get(source, {}) for part in parts]
        made[source] = {
            site: rows(
                [
                    None if site not in sites else _columns(sites[site], part)
                    for sites, part in zip(each, parts, strict=True)
                ],
                parts,
                lambda states, place: widened(states, length, 1),
            )
            for site in sorted({site for sites in each for site in sites})
        }
    return made


def _columns(states: Tensor, part: Part) -> Tensor:
    """A part's columns of what a source showed; at those that it missed lately it showed nothing."""
    missed = part.cache.length - states.shape[1]
    return functional.pad(states, (0, 0, 0, missed))[:, -part.columns :]
