"""Lets a coupled pass see and replace the states behind chosen blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .blocks import find_blocks

Arrive = Callable[[int, Tensor], Tensor]

ARRIVE: ContextVar[Arrive | None] = ContextVar("rc_agents_arrive", default=None)
"""What the running model's taps call with (site index, hidden states); None outside a coupled pass."""

OWNER: ContextVar[int | None] = ContextVar("rc_agents_owner", default=None)
"""The key of the ensemble whose pass is running."""


def tap(
    model: PreTrainedModel, layers: Sequence[int], owner: int
) -> list[torch.utils.hooks.RemovableHandle]:
    """Lets a session see and replace the hidden states behind chosen blocks.

    Outside a coupled pass the hooks do nothing and change no bit.

    Args:
        layers: for each site the 1-based block behind which it lies; several sites may lie behind one block.
        owner: the ensemble's key; passes of other ensembles over the same model do not concern it.

    Returns:
        Handles that take the hooks off.
    """
    blocks = find_blocks(model)
    return [
        blocks[layer - 1].register_forward_hook(_hook(site, owner))
        for site, layer in enumerate(layers)
    ]


def _hook(site: int, owner: int) -> Callable[..., Any]:
    def after_block(module: nn.Module, args: Any, output: Any) -> Any:
        arrive = ARRIVE.get()
        if arrive is None or OWNER.get() != owner:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ModelError(
                f"expected a residual stream of shape (batch, tokens, width), the block gave {shape}"
            )
        new = arrive(site, hidden)
        if new is hidden:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return after_block
