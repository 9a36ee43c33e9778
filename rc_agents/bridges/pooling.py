"""From a source's sequence to the target's positions where the two do not align: learned query pooling.

For a target at state h_t and source states s_1 .. s_S, with n the RMS norm,

    a_t = softmax_j((q + Q n(h_t)) . K n(s_j) / sqrt(d)),    p_t = sum_j a_tj s_j

and the bridge reads p_t as it reads the state of a source with positions of the target's own. The query is a learned
one, q, moved by what the target's state asks for; Q starts at zero. No order is kept but what the states themselves
tell of their place, as those of encoders with position embeddings do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 64
EPS = 1e-6


class QueryPool(nn.Module):
    """Reads one state for each target position out of a whole source sequence; float32 like its bridge."""

    def __init__(self, source_width: int, target_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(target_width, WIDTH, dtype=torch.float32)
        self.key = nn.Linear(source_width, WIDTH, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.query.weight)
        nn.init.normal_(self.query.bias)

    def forward(self, source_BSD: Tensor, mask_BS: Tensor, target_BTD: Tensor) -> Tensor:
        """Returns the pooled states (B, T, source_width).

        Args:
            source_BSD: the source's states, zeros where they are not real; a row without a real one gives zeros.
            mask_BS: which are real.
            target_BTD: the target's states.
        """
        work = torch.promote_types(torch.float32, source_BSD.dtype)
        source, target = source_BSD.to(work), target_BTD.to(work)
        query_BTK = _linear(self.query, _normalised(target))
        key_BSK = _linear(self.key, _normalised(source))
        scores_BTS = query_BTK @ key_BSK.transpose(1, 2) * WIDTH**-0.5
        scores_BTS = scores_BTS.masked_fill(~mask_BS[:, None], torch.finfo(work).min)
        return scores_BTS.softmax(-1) @ source


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return nn.functional.linear(x, layer.weight.to(x.dtype), bias)


def _normalised(h: Tensor) -> Tensor:
    return nn.functional.rms_norm(h, (h.shape[-1],), eps=EPS)
