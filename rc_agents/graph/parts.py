"""What is kept of one text for one node, and how it is recorded while the node's model runs.

Shapes: T tokens of a text, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..backbone import find_blocks
from ..errors import TrainingError
from . import pooling
from .frozen import EncoderNode, FrozenNode

STATES, ENTERING, BEFORE = "states", "entering", "before"


class Enough(Exception):
    """All states that are wanted have been noted."""


def on_disk(tensor: Tensor) -> Tensor:
    """Returns a tensor as it is saved: a copy of its own in memory."""
    return tensor.detach().cpu().contiguous().clone()


def keeps_cache(node: FrozenNode | EncoderNode) -> bool:
    """Whether keys and values are kept for a node: it hears at its last token alone."""
    return bool(node.node.hears) and node.node.position == "last"


def names_of(node: FrozenNode | EncoderNode) -> list[str]:
    """Returns the parts that are kept of a text for a node."""
    if not node.node.hears:
        return [STATES]
    names = [ENTERING]
    if node.node.position == "last":
        names += [f"{kind}{layer}" for layer in range(node.at, node.layer) for kind in "kv"]
        if node.node.pooling != "last":
            names.append(BEFORE)
    return names


def parts_of(
    node: FrozenNode,
    states: Mapping[int, Tensor],
    cache: DynamicCache | None,
    place: int,
    begin: int,
) -> Iterator[tuple[str, Tensor]]:
    """Yields what is kept of one text: row `place` of a pass, from token `begin` on."""
    read_TD = states[node.layer][place, begin:]
    if not node.node.hears:
        yield STATES, condensed(read_TD, node.node.pooling)
        return
    entering_TD = states[node.at][place, begin:]
    if node.node.position == "all":
        yield ENTERING, entering_TD
        return
    yield ENTERING, entering_TD[-1:]
    if node.node.pooling != "last":
        yield BEFORE, read_TD[:-1]
    assert cache is not None
    for layer in range(node.at, node.layer):
        keys, values = _of_layer(node, cache, layer, states[node.at].shape[1])
        yield f"k{layer}", keys[place, :, begin:-1]
        yield f"v{layer}", values[place, :, begin:-1]


def condensed(states_TD: Tensor, kind: str) -> Tensor:
    """All that pooling needs of a text: (1, D), or (T, D) for attention."""
    if kind == "attention":
        return states_TD
    mask = torch.ones(1, len(states_TD), dtype=torch.long)
    pool = pooling.last if kind == "last" else pooling.mean
    return pool(states_TD[None].float(), mask).to(states_TD.dtype)


def recording(node: FrozenNode) -> DynamicCache:
    """Returns a cache that keeps the keys and values of all tokens, beyond a sliding window too."""
    cache = DynamicCache(config=node.model.config.get_text_config(decoder=True))
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()
    return cache


def _of_layer(
    node: FrozenNode, cache: DynamicCache, layer: int, width: int
) -> tuple[Tensor, Tensor]:
    held = cache.layers[layer] if layer < len(cache.layers) else None
    keys, values = (getattr(held, part, None) for part in ("keys", "values"))
    kept = type(held) in (DynamicLayer, DynamicSlidingWindowLayer)
    if not kept or not isinstance(keys, Tensor) or keys.shape[-2] != width:
        raise TrainingError(
            f"node {node.name!r} of type {node.model.config.model_type!r} keeps no keys and values of "
            f"{width} tokens to replay: train with keep=None, or let it hear at position='all'"
        )
    assert isinstance(values, Tensor)
    return keys, values


@contextmanager
def recorded(node: FrozenNode, blocks: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """While inside, notes the states behind some blocks of a node's model, and runs it no further."""
    found: dict[int, Tensor] = {}

    def note(block: int, output: Any) -> None:
        found[block] = output[0] if isinstance(output, tuple) else output
        if len(found) == len(wanted):
            raise Enough

    wanted = set(blocks)
    handles = [
        find_blocks(node.model)[block - 1].register_forward_hook(
            lambda _, args, output, block=block: note(block, output)
        )
        for block in wanted
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
