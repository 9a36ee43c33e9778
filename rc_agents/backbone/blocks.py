"""Where a model's decoder blocks are, and what its forward takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError

BLOCKS = {
    "longcat_flash": "model.layers",
    "xlm": "transformer.attentions",
    "blenderbot": "model.decoder.layers",
    "git": "git.encoder.layer",
    "phi4_multimodal": "model.layers",
    "wav2vec2": "encoder.layers",
}
"""Where the blocks are, for the types in which the count of layers does not tell."""


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the model's decoder blocks: its only outermost ModuleList of `num_hidden_layers` entries.

    Raises:
        ModelError: none or several such lists; the message names the type and the candidates.
    """
    kind = model.config.model_type
    if kind in BLOCKS:
        return model.get_submodule(BLOCKS[kind])  # type: ignore[return-value]
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {name: one for name, one in model.named_modules() if isinstance(one, nn.ModuleList)}
    found = [name for name, one in lists.items() if len(one) == count]
    found = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
    if len(found) > 1:  # towers for images and sound beside the text's
        text = set(model.get_decoder().modules())
        found = [name for name in found if lists[name] in text]
    if len(found) == 1:
        return lists[found[0]]
    shown = ", ".join(f"{name}[{len(lists[name])}]" for name in found or lists) or "none"
    raise ModelError(
        f"model type {kind!r} is not supported: expected exactly one list of {count} blocks, found {shown}"
    )


def num_blocks(model: PreTrainedModel) -> int:
    """Returns how many blocks the model has."""
    return len(find_blocks(model))


def stream_width(model: PreTrainedModel) -> int:
    """Returns the width of the residual stream between blocks."""
    config = model.config.get_text_config(decoder=True)
    return int(config.hidden_size)


def accepted_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Returns the names that the model's own `forward` takes."""
    own = vars(model).get("forward")  # a wrapper around this one model's
    return _parameters(own or type(model).forward)


@functools.lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def cache_argument(model: PreTrainedModel) -> str:
    """Returns under which name the model's `forward` takes its cache."""
    accepted = accepted_arguments(model)
    for name in ("past_key_values", "cache_params"):
        if name in accepted:
            return name
    raise ModelError(
        f"model type {model.config.model_type!r} is not supported: its forward takes no cache"
    )
