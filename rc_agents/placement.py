"""On which device a model lives, and where its states are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import ConfigError, nearest


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
        return device_map
    for key in device_map:
        if key not in names:
            raise ConfigError(
                f"device_map names an unknown model {key!r}; {nearest(str(key), names)}"
            )
    return device_map.get(name)


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


def execution_device(module: nn.Module) -> torch.device:
    """Returns where a module computes: its offload hook's device, else its first weight's."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    tensor = next(iter(module.parameters()), next(iter(module.buffers()), None))
    return tensor.device if tensor is not None else torch.device("cpu")


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device that a model's token ids go to; the CPU for one that runs in another process."""
    device = execution_device(model.get_input_embeddings())
    return torch.device("cpu") if device.type == "meta" else device
