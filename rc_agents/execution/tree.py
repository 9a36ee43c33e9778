"""Branch tokens: some tokens of a pass see only a part of the text, by a mask over queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..backbone import accepted_arguments
from ..placement import input_device

Mask = Tensor | dict[str, Tensor]


@dataclass
class Sight:
    """Who sees whom in one pass of S tokens over K cache slots.

    Attributes:
        allowed: whether a token sees a slot, (B, S, K); every token sees itself.
        positions: of the tokens, (B, S).
        slot_positions: of the tokens that lie in the slots, (B, K).
    """

    allowed: Tensor
    positions: Tensor
    slot_positions: Tensor

    def mask(self, model: PreTrainedModel) -> Mask:
        """Returns it as the 4-D mask (or masks by layer type) that the model's attention takes."""
        config = model.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        types = set(getattr(config, "layer_types", None) or ())
        if not types:
            types = {"full_attention" if window is None else "sliding_attention"}
        masks: dict[str, Tensor] = {}
        for kind in types:
            seen = self.allowed
            if kind == "sliding_attention" and window is not None:
                seen = seen & (self.positions[:, :, None] - self.slot_positions[:, None] < window)
            masks[kind] = _as_mask(seen[:, None], model)
        return masks if len(masks) > 1 else masks.popitem()[1]


def _as_mask(seen: Tensor, model: PreTrainedModel) -> Tensor:
    """Whether each token is seen for sdpa, what is added to the scores for eager attention; (B, 1, S, K)."""
    seen = seen.to(input_device(model))
    if model.config.get_text_config(decoder=True)._attn_implementation == "sdpa":
        return seen
    scores = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
    return scores.masked_fill(~seen, torch.finfo(model.dtype).min)


def takes_branches(model: PreTrainedModel) -> bool:
    """Whether a model can run branch tokens: attention alone, positions and masks from outside, tried on four tokens.

    State-space and convolution layers read every token that came before; distance biases (ALiBi) and some attention
    kernels build their own mask.
    """
    config = model.config.get_text_config(decoder=True)
    if "position_ids" not in accepted_arguments(model) or getattr(config, "alibi", False):
        return False
    if getattr(config, "_attn_implementation", None) not in ("eager", "sdpa"):
        return False
    if not set(getattr(config, "layer_types", None) or ()) <= {
        "full_attention",
        "sliding_attention",
    }:
        return False
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and _obeys(model)


@torch.no_grad()
def _obeys(model: PreTrainedModel) -> bool:
    """Runs the main tokens 0 1 2 and a branch behind token 0, and compares the branch with a run of its own."""
    device, size = input_device(model), model.config.get_text_config(decoder=True).vocab_size
    ids = torch.tensor([[min(index, size - 1) for index in (5, 6, 7, 8)]], device=device)
    allowed = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    allowed[0, 3, 1:3] = False
    positions = torch.tensor([[0, 1, 2, 1]])
    sight = Sight(allowed, positions, positions)

    def last(run: Callable[[], Any]) -> Tensor:
        return run().logits[0, -1].float()

    try:
        branch = last(
            lambda: model(
                ids,
                attention_mask=sight.mask(model),
                position_ids=positions.to(device),
                use_cache=False,
            )
        )
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError):
        return False  # a model that builds its mask in another way
    alone = last(lambda: model(ids[:, [0, 3]], use_cache=False))
    seeing_all = last(lambda: model(ids, use_cache=False))
    return bool((branch - alone).abs().max() <= 0.05 * (seeing_all - alone).abs().max())
