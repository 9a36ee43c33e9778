"""Where a model's decoder blocks are, and what its forward takes."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError

BLOCKS = {
    "longcat_flash": "model.layers",
    "xlm": "transformer.attentions",
    "blenderbot": "model.decoder.layers",
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
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    found = [(path, module) for path, module in lists if len(module) == count]
    outer = {path for path, _ in found}
    found = [one for one in found if not any(one[0].startswith(f"{path}.") for path in outer)]
    if len(found) == 1:
        return found[0][1]
    shown = ", ".join(f"{path}[{len(module)}]" for path, module in found or lists) or "none"
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


def accepted_arguments(model: PreTrainedModel) -> set[str]:
    """Returns the names that the model's own `forward` takes."""
    return set(inspect.signature(model.forward).parameters)


def cache_argument(model: PreTrainedModel) -> str:
    """Returns under which name the model's `forward` takes its cache."""
    accepted = accepted_arguments(model)
    for name in ("past_key_values", "cache_params"):
        if name in accepted:
            return name
    raise ModelError(
        f"model type {model.config.model_type!r} is not supported: its forward takes no cache"
    )
