"""Frozen encoders as sources: what they take, what states they give, and which positions of those are real.

An encoder (of pictures, of sound) reads its own inputs instead of the text's tokens, and its states have positions of
their own. Shapes: B rows, S positions of the encoder, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import InputError, ModelError
from ..placement import execution_device
from .taps import ARRIVE, OWNER, tap

Inputs = Mapping[str, Any]
"""What an encoder's `forward` takes, by name, each tensor with B rows."""

_OWNERS = itertools.count(-1, -1)  # ensembles count up from 0


@dataclass(frozen=True)
class Kind:
    """What the encoders of one kind take and give.

    Args:
        shape: config -> sizes of the main input behind the rows, None for any.
        shortest: config -> the same for the smallest input that the encoder can read.
        real: (config, inputs, S) -> which positions are real, (B, S); None where all are.
    """

    shape: Callable[[Any], tuple[int | None, ...]]
    shortest: Callable[[Any], tuple[int, ...]]
    real: Callable[[Any, Inputs, int], Tensor | None]


def _pixels(config: Any) -> tuple[int, ...]:
    size = config.image_size
    return (config.num_channels, *((size, size) if isinstance(size, int) else size))


def _samples(config: Any, frames: int = 3) -> tuple[int, ...]:
    """Samples of so many frames, back through the convolutions that make them."""
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        frames = (frames - 1) * stride + kernel
    return (frames,)


def _frames(config: Any, inputs: Inputs, count: int) -> Tensor | None:
    """The frames that lie whole in the real samples, which stand at the beginning of a row."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    lengths = mask.sum(-1)
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        lengths = (lengths - kernel).div(stride, rounding_mode="floor") + 1
    return torch.arange(count, device=lengths.device) < lengths[:, None]


PICTURES = Kind(_pixels, _pixels, lambda config, inputs, count: None)
SOUNDS = Kind(lambda config: (None,), _samples, _frames)

ENCODERS: dict[str, Kind] = {
    "vit": PICTURES,
    "clip_vision_model": PICTURES,
    "siglip_vision_model": PICTURES,
    "wav2vec2": SOUNDS,
}
"""The types that can be a source, by `model_type`."""

TOWERS = {"clip": "vision_config", "siglip": "vision_config"}
"""Types of two towers, of which the one that this part of the config describes is taken."""


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether models of this config are encoders."""
    return config.model_type in ENCODERS


def encoder_config(place: str, **options: Any) -> PreTrainedConfig | None:
    """Returns the config of the encoder that lies at a folder or hub id; None for any other model."""
    kind = PreTrainedConfig.get_config_dict(place, **options)[0].get("model_type")
    if kind not in TOWERS and kind not in ENCODERS:
        return None
    config: PreTrainedConfig = AutoConfig.from_pretrained(place, **options)
    return getattr(config, TOWERS[kind]) if kind in TOWERS else config


def check_whole(name: str, model: PreTrainedModel) -> None:
    """Raises `ModelError` where a model is more than an encoder: both towers, or one with a head for a task."""
    kind = type(model).__name__
    if model.config.model_type in TOWERS:
        raise ModelError(
            f"model {name!r} is a whole {kind}; pass the encoder in it, its vision_model"
        )
    if not is_encoder(model.config):
        return
    bare: Any = MODEL_MAPPING[type(model.config)]
    if not isinstance(model, bare):
        raise ModelError(f"model {name!r} is a {kind}; pass the encoder in it, its base_model")


@dataclass
class Encoded:
    """What an encoder made of one request.

    Args:
        states: for each site (B, S, D), zeros at positions that are not real.
        mask: which positions are real, (B, S).
        given: what was encoded, as the call gave it.
    """

    states: list[Tensor]
    mask: Tensor
    given: Any = None

    def select(self, rows: Tensor) -> Encoded:
        """Returns it with its rows reordered, kept or repeated as `rows` says."""
        states = [one[rows.to(one.device)] for one in self.states]
        return Encoded(states, self.mask[rows.to(self.mask.device)], self.given)


def encode(model: PreTrainedModel, inputs: Inputs, owner: int) -> Encoded:
    """Runs an encoder that `tap` has prepared for `owner`; returns its states at every tap.

    Its own `forward` runs, untouched, on its own device; floating inputs are cast to its weights' type.
    """
    found: list[Tensor] = []

    def keep(site: int, hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    here = placed(inputs, model)
    tokens = ARRIVE.set(keep), OWNER.set(owner)
    try:
        model(**here, return_dict=True)
    finally:
        ARRIVE.reset(tokens[0])
        OWNER.reset(tokens[1])
    rows, count = found[0].shape[:2]
    real = ENCODERS[model.config.model_type].real(model.config, here, count)
    mask = torch.ones(rows, count, dtype=torch.bool) if real is None else real
    mask = mask.to(found[0].device)
    return Encoded([one.masked_fill(~mask[..., None], 0) for one in found], mask)


def encoder_states(
    model: PreTrainedModel, inputs: Inputs, layer: int, where: str = "inputs"
) -> tuple[Tensor, Tensor]:
    """Returns an encoder's states behind a layer and which of its positions are real: (B, S, D) and (B, S).

    Args:
        model: loaded, of one of the types in `ENCODERS`.
        inputs: what its own `forward` takes.
        layer: 1-based.
        where: what to call the inputs in messages.
    """
    owner = next(_OWNERS)
    handles = tap(model, [layer], owner)
    try:
        encoded = encode(model, checked(model, inputs, where), owner)
    finally:
        for handle in handles:
            handle.remove()
    return encoded.states[0], encoded.mask


def placed(inputs: Inputs, model: PreTrainedModel) -> dict[str, Any]:
    """Returns inputs on an encoder's device, floating ones in its weights' type."""
    device = execution_device(model)
    return {
        name: value.to(device, model.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def shortest_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the smallest input of one row that an encoder can read: zeros."""
    shape = ENCODERS[model.config.model_type].shortest(model.config)
    return {model.main_input_name: torch.zeros(1, *shape)}


def checked(
    model: PreTrainedModel, inputs: Any, where: str, accepted: Collection[str] = ()
) -> Inputs:
    """Raises `InputError` unless these are inputs that an encoder can read; returns them.

    Args:
        model: the encoder.
        inputs: by name.
        where: what to call them in messages.
        accepted: the names that its `forward` takes; any where left out.
    """
    main = model.main_input_name
    if not isinstance(inputs, Mapping) or main not in inputs:
        keys = f"the keys {sorted(map(str, inputs))}" if isinstance(inputs, Mapping) else inputs
        raise InputError(
            f"{where} needs {main!r}, as its image or feature processor returns it; got {keys!s:.80}"
        )
    for name in inputs:
        if accepted and name not in accepted:
            raise InputError(
                f"{where} has {name!r}, which a {model.config.model_type!r} does not take"
            )
    value, expected = inputs[main], ENCODERS[model.config.model_type].shape(model.config)
    if inputs.get("interpolate_pos_encoding"):
        expected = (expected[0], *(None for _ in expected[1:]))
    _check_tensor(value, expected, f"{where}[{main!r}]")
    for name, other in inputs.items():
        if isinstance(other, Tensor) and len(other) != len(value):
            raise InputError(
                f"{where}[{name!r}] has {len(other)} rows and {main!r} has {len(value)}"
            )
    return inputs


def _check_tensor(value: Any, expected: tuple[int | None, ...], where: str) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    fits = (
        isinstance(value, Tensor) and value.is_floating_point() and value.dim() == len(expected) + 1
    )
    if fits:
        sizes = zip(value.shape[1:], expected, strict=True)
        fits = all(want in (None, size) for size, want in sizes)
    if not fits:
        wanted = ", ".join(["rows", *("any" if one is None else str(one) for one in expected)])
        raise InputError(f"{where} is a floating tensor of shape ({wanted}), got {shape}")
