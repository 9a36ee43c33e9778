"""Refuses a model that cannot take part in a coupling, by its type and with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..config import CouplingConfig
from ..errors import ModelError
from ..placement import input_device
from .blocks import cache_argument, find_blocks, stream_width
from .encoders import check_whole, is_encoder, placed, shortest_inputs
from .identity import held_parts
from .loading import first_line


def check(name: str, model: PreTrainedModel) -> None:
    """Raises `ModelError` unless the model is a causal language model or an encoder that can be coupled.

    Runs three tokens, or an encoder's smallest input, through it: every block must pass one residual stream on, once
    and in order.

    Args:
        name: the model's name in the ensemble, for messages.
        model: loaded and frozen.
    """
    if model.config.model_type == CouplingConfig.model_type:
        raise ModelError(f"model {name!r} is itself an ensemble; couple the models in it instead")
    check_whole(name, model)
    encodes = is_encoder(model.config)
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"model {name!r} of type {model.config.model_type!r} is not supported: it reads the text with an encoder; "
            "use a decoder-only model"
        )
    blocks = find_blocks(model)
    if not encodes:
        cache_argument(model)
    check_finite(name, model)
    passed = _trial(
        name, model, placed(shortest_inputs(model), model) if encodes else _three_tokens(model)
    )
    if [block for block, _ in passed] != list(range(1, len(blocks) + 1)):
        shown = ", ".join(str(block) for block, _ in passed[: len(blocks) + 1]) or "none"
        raise _unsupported(
            name, model, f"its forward passes the blocks {shown}, not each of {len(blocks)} once"
        )
    count = passed[0][1][1] if encodes and len(passed[0][1]) == 3 else 3
    expected = (1, count, stream_width(model))
    for block, shape in passed:
        if shape != expected:
            read = "one input" if encodes else "three tokens"
            raise _unsupported(
                name,
                model,
                f"its block {block} gives states of shape {shape} for {read}, not {expected}",
            )


def _unsupported(name: str, model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"model {name!r} of type {model.config.model_type!r} is not supported: {reason}"
    )


def _three_tokens(model: PreTrainedModel) -> dict[str, Any]:
    text = model.config.get_text_config(decoder=True)
    ids = torch.tensor([[0, 1, 2]]).to(input_device(model))
    return {"input_ids": ids, "use_cache": True, cache_argument(model): DynamicCache(config=text)}


@torch.no_grad()
def _trial(
    name: str, model: PreTrainedModel, arguments: Mapping[str, Any]
) -> list[tuple[int, Any]]:
    """Runs the model; returns which blocks it passed and the shape of the states behind each."""
    passed: list[tuple[int, Any]] = []

    def after(block: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kind = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        passed.append((block, kind))

    handles = [
        block.register_forward_hook(lambda _, args, output, number=number: after(number, output))
        for number, block in enumerate(find_blocks(model), 1)
    ]
    reads_tokens = "input_ids" in arguments
    try:
        output = model(**arguments, return_dict=True)
    except Exception as error:
        read = "three tokens" if reads_tokens else "one input"
        reason = f"{read} through it raise {type(error).__name__}: {first_line(error)}"
        raise _unsupported(name, model, reason) from error
    finally:
        for handle in handles:
            handle.remove()
    if reads_tokens and getattr(output, "logits", None) is None:
        raise _unsupported(name, model, "it gives no logits; load it with AutoModelForCausalLM")
    return passed


def check_finite(name: str, model: PreTrainedModel) -> None:
    """Raises `ModelError` when a weight is NaN or infinite, naming the model and the tensor."""
    for path, tensor in model.named_parameters():
        if not all(map(_finite, held_parts(tensor.detach()))):
            raise ModelError(
                f"model {name!r} has NaN or infinite weights in {path!r}; load it again or replace it"
            )


def _finite(values: torch.Tensor) -> bool:
    if not values.is_floating_point() or values.is_meta:
        return True
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
