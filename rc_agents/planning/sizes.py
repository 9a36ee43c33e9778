"""How large a model is, from a skeleton on PyTorch's meta device: no weight is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils.dataclasses import CustomDtype
from accelerate.utils.modeling import dtype_byte_size
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache

from .. import backbone
from ..config import ModelRef
from ..errors import ModelError
from ..quantization import bits

PROBE = (8, 16)
"""Tokens of the two passes whose caches are compared."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSize:
    """What one model takes.

    Args:
        name: the model.
        skeleton: its structure, on the meta device; the model itself where it is loaded already.
        probe: its structure on the meta device in any case.
        narrow: weights that a quantization holds in another type, by name.
    """

    name: str
    skeleton: PreTrainedModel
    probe: PreTrainedModel
    narrow: dict[str, Any]

    @cached_property
    def tensors(self) -> dict[str, float]:
        """Bytes of every parameter and buffer by name; those that are tied come once."""
        named = (*self.skeleton.named_parameters(), *self.skeleton.named_buffers())
        return {
            name: one.numel() * dtype_byte_size(self.narrow.get(name, one.dtype))
            for name, one in named
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return int(sum(self.tensors.values()))

    @property
    def blocks(self) -> list[str]:
        """Where the blocks are, in order."""
        places = {id(module): name for name, module in self.skeleton.named_modules()}
        return [places[id(block)] for block in backbone.find_blocks(self.skeleton)]

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return backbone.stream_width(self.skeleton)

    @property
    def state_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self.width * self.skeleton.dtype.itemsize

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, None where its config does not say."""
        text = self.skeleton.config.get_text_config(decoder=True)
        return getattr(text, "max_position_embeddings", None)

    @cached_property
    def cache_bytes(self) -> int | None:
        """Bytes that each more token takes in its cache, None where that cannot be found on a skeleton.

        Measured by two passes without numbers, so that it holds for any kind of attention. A cache that stops growing,
        as that of a sliding window does, counts as if it grew.
        """
        try:
            told = self.probe.config.to_json_string()
        except Exception:  # a config's own code
            return _growth(self.probe)
        kind = f"{self.probe.__class__} {self.probe.dtype} {told}"
        if kind not in _GROWTH:
            _GROWTH[kind] = _growth(self.probe)
        return _GROWTH[kind]


_GROWTH: dict[str, int | None] = {}
"""Bytes a token by kind of model, so that models over one base, and plans after the first, are measured once."""


def _growth(skeleton: PreTrainedModel) -> int | None:
    try:
        short, long = (_cached(skeleton, tokens) for tokens in PROBE)
    except Exception:  # any model's own code may need numbers to run, which a skeleton has not
        return None
    return (long - short) // (PROBE[1] - PROBE[0])


def _cached(skeleton: PreTrainedModel, tokens: int) -> int:
    """Bytes of a cache after so many tokens."""
    cache = DynamicCache(config=skeleton.config.get_text_config(decoder=True))
    skeleton.config.pad_token_id = None  # some models look for it in the tokens
    ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
    with torch.inference_mode():
        skeleton(input_ids=ids, use_cache=True, **{backbone.cache_argument(skeleton): cache})
    return sum(one.numel() * one.element_size() for one in _held(cache))


def _held(cache: DynamicCache) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (one for one in vars(layer).values() if isinstance(one, Tensor))


def measure(
    name: str,
    model: ModelRef | PreTrainedConfig | PreTrainedModel,
    dtype: Any,
    remote: bool,
    config: PreTrainedConfig | None = None,
) -> ModelSize:
    """Returns a model's size.

    Args:
        name: the model, for messages.
        model: its reference, its configuration, or the model itself.
        dtype: of its weights where the reference has none; None for what is stored.
        remote: whether code that comes with it may run.
        config: its configuration where that is known already.
    """
    if isinstance(model, PreTrainedModel):
        probe = _skeleton(name, model.config, model.dtype, remote)
        return ModelSize(name=name, skeleton=model, probe=probe, narrow={})
    quantization = None
    if isinstance(model, PreTrainedConfig):
        config = model
    else:
        dtype, quantization = model.dtype or dtype, model.quantization
        config = config or _config(name, model, remote)
    skeleton = _skeleton(name, config, dtype, remote)
    quantization = quantization or getattr(config, "quantization_config", None)
    narrow = _narrow(skeleton, quantization)
    return ModelSize(name=name, skeleton=skeleton, probe=skeleton, narrow=narrow)


def _config(name: str, ref: ModelRef, remote: bool) -> Any:
    options = {"revision": ref.revision, "subfolder": ref.subfolder}
    options = {key: value for key, value in options.items() if value is not None}
    place = backbone.locate(str(ref.base))
    try:
        return backbone.encoder_config(place, **options) or AutoConfig.from_pretrained(
            place, trust_remote_code=remote, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {name!r}: no configuration at {ref.base!r}: {backbone.first_line(error)}"
        ) from error


def _skeleton(name: str, config: PreTrainedConfig, dtype: Any, remote: bool) -> PreTrainedModel:
    if dtype in (None, "auto"):
        dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or config.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            auto: Any = AutoModel if backbone.is_encoder(config) else AutoModelForCausalLM
            return auto.from_config(config, dtype=dtype, trust_remote_code=remote).eval()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"model {name!r}: its configuration gives no causal language model: {backbone.first_line(error)}"
        ) from error


def _narrow(skeleton: PreTrainedModel, quantization: Any) -> dict[str, Any]:
    """The weights of linear layers but the output's, which quantizations leave out; with unknown bits none."""
    count = bits(quantization)
    if count is None:
        return {}
    kind: Any = torch.int8 if count == 8 else CustomDtype.INT4
    output = skeleton.get_output_embeddings()
    return {
        f"{name}.weight": kind
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
