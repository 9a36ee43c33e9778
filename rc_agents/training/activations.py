"""Recomputes the insides of the frozen blocks in the backward pass, so that only the stream between them is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rc_agents.backbone import find_blocks
from rc_agents.modeling import CoupledForCausalLM


@contextmanager
def recomputed(model: CoupledForCausalLM) -> Iterator[None]:
    """Checkpoints every block of every model inside the block of code; gradients stay the same.

    A block's own `forward` is wrapped, not its call: the hooks by which the models meet run once, and are never
    recomputed. Blocks that no gradient passes run as they are.
    """
    blocks = {id(one): one for base in model.models.values() for one in find_blocks(base)}
    owns: dict[int, Any] = {key: vars(block).get("forward") for key, block in blocks.items()}
    for block in blocks.values():
        block.forward = _recomputing(block.forward)
    try:
        yield
    finally:
        for key, block in blocks.items():
            if owns[key] is None:
                del block.forward
            else:
                block.forward = owns[key]


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        if not torch.is_grad_enabled() or not any(one.requires_grad for one in tensors):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
