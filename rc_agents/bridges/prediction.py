"""What a bridge reads when it reads what its source would say next.

p = softmax(source's output layer(h_j)), read as the mean p E_i of the target's input embeddings: a soft token, the
source's answer in the words of its target. Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 512  # positions whose distributions are held at a time


class Prediction:
    """Turns a source's states into soft tokens of its target.

    Args:
        says: states (N, D_source) -> logits (N, V) of the source.
        embedding: the target's input embeddings, of the same vocabulary; padding rows beyond either are left out.
    """

    def __init__(self, says: Callable[[Tensor], Tensor], embedding: nn.Module) -> None:
        self.says, self.embedding = says, embedding

    def __call__(self, source_BTD: Tensor) -> Tensor:
        """Returns (B, T, D_target), in the embedding's dtype and on its device."""
        weight: Any = self.embedding.weight
        embedding, parts = weight.detach(), []
        for states_ND in source_BTD.flatten(0, 1).split(CHUNK):
            logits = self.says(states_ND)[:, : len(embedding)].float()
            said = logits.softmax(-1).to(embedding.device, embedding.dtype)
            parts.append(said @ embedding[: said.shape[-1]])
        found = torch.cat(parts) if parts else embedding.new_zeros(0, embedding.shape[1])
        return found.unflatten(0, source_BTD.shape[:2])
