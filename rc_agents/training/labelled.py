"""Logits where a label is, and nowhere else: the output layer is most of a small model's step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def predicting(labels_BT: Tensor) -> Tensor:
    """Returns which positions predict a label, (B, T) bool: those before a label that is not -100."""
    found = labels_BT.new_zeros(labels_BT.shape).bool()
    found[:, :-1] = labels_BT[:, 1:] != -100
    return found


@contextmanager
def only_at(model: PreTrainedModel, keep_BT: Tensor) -> Iterator[None]:
    """Inside the block, `model(...)` returns logits (1, P, V) for the P positions kept, row by row.

    What the model does behind its output layer (scaling, soft-capping) it does with these.
    """
    layer = model.get_output_embeddings()

    def narrow(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden_BTD = args[0]
        return (hidden_BTD[keep_BT.to(hidden_BTD.device)][None],)

    handle = layer.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()
