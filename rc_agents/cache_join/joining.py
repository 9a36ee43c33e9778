"""Joins the caches of models that read the anchor's tokens, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from ..backbone import Encoded
from ..cache import CoupledCache
from . import own_tokens
from .parts import Part, rows, widened

KNOWN = (
    *(DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer),
    *(LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer),
)
"""Layers whose rows are independent, so that they can stand beside those of another batch."""


def unknown_layer(configs: Mapping[str, PreTrainedConfig]) -> tuple[str, str] | None:
    """Returns a model and the kind of a layer of its cache that cannot be joined; None where all can."""
    for name, config in configs.items():
        for layer in DynamicCache(config=config.get_text_config(decoder=True)).layers:
            if type(layer) not in KNOWN:
                return name, type(layer).__name__
    return None


def join(parts: Sequence[Part], configs: Mapping[str, PreTrainedConfig]) -> CoupledCache:
    """Returns one cache with the rows of all parts, one part after another, their last columns side by side.

    Shorter parts are padded on the left with zeros, which the attention mask has to hide. A model that has not read all
    of a part, because none of its rows asks for it (any more), gets zeros for it; nothing of it reaches these rows.

    Args:
        parts: of one ensemble, with local models, between two passes.
        configs: the models' by name.
    """
    length = max(part.columns for part in parts)
    caches: dict[str, Cache] = {}
    seen = dict.fromkeys(configs, 0)
    texts = own_tokens.texts(parts, length)
    for name in configs:
        if name in texts:
            caches[name] = own_tokens.cache(name, parts, texts[name])
            continue
        read = [part.cache.seen[name] == part.cache.length for part in parts]
        if any(read):
            caches[name], seen[name] = _joined(name, parts, read, length), length
        else:
            caches[name] = DynamicCache(config=configs[name].get_text_config(decoder=True))
    made = CoupledCache(caches)
    made.seen, made.texts = seen, texts
    made.histories = own_tokens.histories(parts, length)
    made.encoded = _encoded(parts)
    made.ids = torch.cat([_laid(part, length) for part in parts])
    return made


def _encoded(parts: Sequence[Part]) -> dict[str, Encoded]:
    """What encoders made of what they were shown; no position is real in rows where they were shown nothing."""
    made = {}
    for name in sorted({name for part in parts for name in part.cache.encoded}):
        each = [part.cache.encoded.get(name) for part in parts]
        pattern = next(one for one in each if one is not None)
        count = max(one.mask.shape[1] for one in each if one is not None)

        def behind(states: Tensor, place: int, count: int = count) -> Tensor:
            return widened(states.flip(1), count, 1).flip(1)

        states = [
            rows([None if one is None else one.states[site] for one in each], parts, behind)
            for site in range(len(pattern.states))
        ]
        mask = rows([None if one is None else one.mask for one in each], parts, behind)
        made[name] = Encoded(states, mask)
    return made


def _laid(part: Part, length: int) -> Tensor:
    """A part's tokens, (R, length), zeros in front."""
    assert part.cache.ids is not None
    ids = part.cache.ids[part.rows.to(part.cache.ids.device)]
    return widened(ids[:, -part.columns :], length, 1)


def _joined(name: str, parts: Sequence[Part], read: Sequence[bool], length: int) -> Cache:
    """A model's cache of all parts' rows, in which those that it has not read are zeros."""
    pattern = next(part.cache.caches[name] for part, has in zip(parts, read, strict=True) if has)
    made = copy.copy(pattern)
    made.layers = [
        _layer(
            [
                part.cache.caches[name].layers[place] if has else None
                for part, has in zip(parts, read, strict=True)
            ],
            parts,
            length,
        )
        for place in range(len(pattern.layers))
    ]
    return made


def _layer(layers: Sequence[Any], parts: Sequence[Part], length: int) -> Any:
    """One layer of all parts' rows; None stands for a part that the model has not read."""
    made = copy.copy(next(layer for layer in layers if layer is not None))
    if isinstance(made, DynamicLayer) and made.is_initialized:
        width = length
        if isinstance(made, DynamicSlidingWindowLayer):
            made.cumulative_length, width = length, min(length, made.sliding_window - 1)
        for name in ("keys", "values"):
            held = [None if layer is None else getattr(layer, name) for layer in layers]
            setattr(made, name, _columns(held, parts, width))
    if isinstance(made, LinearAttentionLayer):
        for name in ("conv_states", "recurrent_states"):
            held = [{} if layer is None else getattr(layer, name) for layer in layers]
            states = {
                key: None if state is None else rows([one.get(key) for one in held], parts)
                for key, state in getattr(made, name).items()
            }
            setattr(made, name, states)
    return made


def _columns(held: Sequence[Tensor | None], parts: Sequence[Part], width: int) -> Tensor:
    """Joins keys or values, (R, heads, columns, D); a sliding window holds fewer columns than were read."""
    cut = [
        None if states is None else states[:, :, -min(part.columns, width) :]
        for states, part in zip(held, parts, strict=True)
    ]
    return rows(cut, parts, lambda states, place: widened(states, width, 2))
