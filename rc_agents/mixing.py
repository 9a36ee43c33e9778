"""From several models' logits to the ensemble's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .bridges import Named
from .errors import ConfigError
from .topology import ANCHOR

FILL = -1e4  # logit of a token that a smaller vocabulary lacks, as in the reference code


class OutputMixer(nn.Module):
    """fused = sum_i w_i logits_i over models that share a vocabulary.

    Args:
        kind: `anchor` (the anchor's own logits), `average` (w_i = 1/n), `learned` (w = softmax of one trained value a
            model, zero at the start) or `sigmoid` (two models, w = m, 1 - m with m a trained sigmoid, the published
            two-model form).
        names: the models, the anchor first.
    """

    def __init__(self, kind: str, names: list[str]) -> None:
        super().__init__()
        self.kind = kind
        if kind == "sigmoid" and len(names) != 2:
            raise ConfigError(
                f"mix='sigmoid' is the published two-model form, got {len(names)} models; use 'learned'"
            )
        if kind == "learned":
            self.values = Named()
            for name in names:
                self.values[name] = nn.Parameter(torch.zeros(()))
        elif kind == "sigmoid":
            self.value = nn.Parameter(torch.zeros(()))

    def new_value(self) -> nn.Parameter | None:
        """Returns what is trained for one more model, None where nothing is.

        Raises:
            ConfigError: the mix takes no more models.
        """
        if self.kind == "sigmoid":
            raise ConfigError(
                "mix='sigmoid' is the published two-model form and takes no third model"
            )
        if self.kind != "learned":
            return None
        return nn.Parameter(torch.zeros_like(self.values[ANCHOR]))

    def add(self, name: str, value: nn.Parameter | None) -> None:
        """Takes in another model with its `new_value`."""
        if value is not None:
            self.values[name] = value

    def remove(self, name: str) -> None:
        """Forgets a model."""
        if self.kind == "sigmoid":
            self.kind = "anchor"
            del self.value
        elif self.kind == "learned":
            del self.values[name]

    def weights(
        self,
        names: list[str],
        presence: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Returns the weights of `names`, shape (n,), summing to one; (n, B) where rows differ.

        Args:
            names: the models at hand.
            presence: whether each takes part in each row, (B,) by name; None where all do.
            dtype: of the weights.
        """
        if self.kind == "learned":
            values = torch.stack([self.values[name].to(dtype) for name in names])
        elif self.kind == "sigmoid" and len(names) == 2:
            value = self.value.to(dtype)
            values = torch.stack([nn.functional.logsigmoid(v) for v in (value, -value)])
        else:
            values = torch.zeros(len(names), dtype=dtype)
        if presence is None:
            return values.softmax(0)
        on = torch.stack([presence[name].to(values.device) for name in names])  # (n, B)
        return values[:, None].masked_fill(~on, -torch.inf).softmax(0)

    def forward(
        self, logits: dict[str, Tensor], presence: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Mixes logits by name, each (B, T, V_i) at the same positions; the anchor's come first."""
        anchor = next(iter(logits.values()))
        if self.kind == "anchor" or len(logits) == 1:
            return anchor
        width = max(part.shape[-1] for part in logits.values())
        work = torch.promote_types(torch.float32, anchor.dtype)
        weights = self.weights(list(logits), presence, work).reshape(len(logits), -1, 1, 1)
        fused = torch.zeros((), device=anchor.device, dtype=work)
        for weight, part in zip(weights, logits.values(), strict=True):
            padded = nn.functional.pad(part, (0, width - part.shape[-1]), value=FILL)
            fused = fused + weight.to(anchor.device) * padded.to(anchor.device)
        return fused.to(anchor.dtype)
