"""On which device and in which form a model lives, and where its states are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .config import ModelRef
from .errors import ConfigError, nearest

DISK = "disk"


def device_map_of(name: str, device_map: Any, names: Sequence[str]) -> Any:
    """Returns one model's device map out of the ensemble's.

    Args:
        name: the model.
        device_map: None, one value for all ("cpu", 0, "auto", a torch.device), or a dict by model name whose values
            are whatever Hugging Face accepts; a model that the dict leaves out gets None.
        names: all models, to check the dict's keys.

    Raises:
        ConfigError: a key that is no model's name.
    """
    if not isinstance(device_map, dict):
        return _as_map(device_map)
    for key in device_map:
        if key not in names:
            raise ConfigError(
                f"device_map names an unknown model {key!r}; {nearest(str(key), names)}"
            )
    return _as_map(device_map.get(name))


def _as_map(place: Any) -> Any:
    """A whole model on disk, which Hugging Face knows as a layer map alone."""
    return {"": DISK} if place == DISK else place


def dtype_of(name: str, dtype: Any, names: Sequence[str]) -> Any:
    """Returns one model's dtype out of the ensemble's: None, one for all, or a dict by model name."""
    if isinstance(dtype, dict):
        for key in dtype:
            if key not in names:
                raise ConfigError(
                    f"dtype names an unknown model {key!r}; {nearest(str(key), names)}"
                )
        dtype = dtype.get(name)
    if isinstance(dtype, str) and dtype != "auto":
        known = getattr(torch, dtype, None)
        if not isinstance(known, torch.dtype) or not known.is_floating_point:
            raise ConfigError(
                f"dtype {dtype!r} is unknown; {nearest(dtype, ('float32', 'bfloat16', 'float16'))}"
            )
    elif dtype is not None and not isinstance(dtype, (str, torch.dtype)):
        raise ConfigError(
            f"dtype is a torch.dtype or its name, got {type(dtype).__name__}: {dtype!r}"
        )
    return dtype


def quantization_of(name: str, ref: ModelRef, asked: Any, names: Sequence[str]) -> ModelRef:
    """Returns a model's reference with the quantization that the ensemble asks for.

    Args:
        name: the model.
        ref: its reference, whose own quantization stays where nothing else is asked for.
        asked: None, one for all, or a dict by model name, in which None takes the reference's away; a configuration as
            a dict is told from one by its "quant_method".
        names: all models, to check the dict's keys.
    """
    if asked is None:
        return ref
    if not isinstance(asked, Mapping) or "quant_method" in asked:
        return replace(ref, quantization=asked)
    for key in asked:
        if key not in names:
            raise ConfigError(
                f"quantization names an unknown model {key!r}; {nearest(str(key), names)}"
            )
    return replace(ref, quantization=asked[name]) if name in asked else ref


def execution_device(module: nn.Module) -> torch.device:
    """Returns where a module computes: its offload hook's device, else its first weight's."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    tensor = next(iter(module.parameters()), next(iter(module.buffers()), None))
    return tensor.device if tensor is not None else torch.device("cpu")


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device that a model's inputs go to; the CPU for one that runs in another process."""
    reads_tokens = model.main_input_name == "input_ids"
    device = execution_device(model.get_input_embeddings() if reads_tokens else model)
    return torch.device("cpu") if device.type == "meta" else device
