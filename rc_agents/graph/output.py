"""What reads the last level's states and answers.

With r_n = R_n n(p_n) of each node n that is read, K and V linear and a_kn = softmax_n(q_k . K r_n / sqrt(d)) a head:

    choice      score_k = c_k . sum_n a_kn V r_n         q_k and c_k learned for each choice k
    vocabulary  h <- h + O sum_n a_n V r_n               q = Q n(h), read at every position of the voice's last block

a, the routing weights, say whom the answer listens to. Shapes: B texts, N nodes read, K choices, H heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .latent import unit
from .settings import OutputConfig


class CrossAttention(nn.Module):
    """Queries attend over the nodes that are read.

    Args:
        output: says width and heads.
        widths: of the streams of the nodes read, in order.
        normalize: whether what they show is brought to RMS 1 first.
    """

    def __init__(self, output: OutputConfig, widths: Mapping[str, int], normalize: bool) -> None:
        super().__init__()
        self.names, self.heads, self.normalize = tuple(widths), output.heads, normalize
        self.reads = nn.ModuleDict(
            {name: nn.Linear(width, output.width, bias=False) for name, width in widths.items()}
        )
        self.key = nn.Linear(output.width, output.width, bias=False)
        self.value = nn.Linear(output.width, output.width, bias=False)

    def forward(self, query_BKD: Tensor, shown: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns what was heard (B, K, D) and the routing weights (B, H, K, N)."""
        weight = self.key.weight
        read = [shown[name].to(weight.device, weight.dtype) for name in self.names]
        read = [unit(one) if self.normalize else one for one in read]
        nodes_BND = torch.stack(
            [self.reads[name](one) for name, one in zip(self.names, read, strict=True)], 1
        )
        query, key, value = (
            self._split(one) for one in (query_BKD, self.key(nodes_BND), self.value(nodes_BND))
        )
        weights_BHKN = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        return (weights_BHKN @ value).transpose(1, 2).flatten(2), weights_BHKN

    def _split(self, x_BKD: Tensor) -> Tensor:
        return x_BKD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ChoiceReadout(nn.Module):
    """Scores choices."""

    def __init__(self, output: OutputConfig, widths: Mapping[str, int], normalize: bool) -> None:
        super().__init__()
        self.attention = CrossAttention(output, widths, normalize)
        self.queries = nn.Parameter(torch.randn(output.queries, output.width))
        self.scores = nn.Parameter(torch.randn(output.queries, output.width) / output.width)

    def forward(self, shown: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the scores (B, K) and the routing weights (B, H, K, N)."""
        count = len(next(iter(shown.values())))
        heard_BKD, weights = self.attention(self.queries.expand(count, -1, -1), shown)
        return (heard_BKD * self.scores).sum(-1), weights


class Head(nn.Module):
    """A classifier on frozen states, the control of the seed: W2 gelu(W1 [n(p_n)] + b1) + b2."""

    def __init__(self, output: OutputConfig, widths: Mapping[str, int], normalize: bool) -> None:
        super().__init__()
        self.names, self.normalize = tuple(widths), normalize
        self.hidden = nn.Linear(sum(widths.values()), output.width)
        self.scores = nn.Linear(output.width, output.queries)

    def forward(self, shown: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the scores (B, K) and even weights (B, 1, K, N), as it has no routing."""
        weight = self.hidden.weight
        read = [shown[name].to(weight.device, weight.dtype) for name in self.names]
        read = [unit(one) if self.normalize else one for one in read]
        scores_BK = self.scores(nn.functional.gelu(self.hidden(torch.cat(read, -1))))
        weights = scores_BK.new_full(
            (*scores_BK.shape[:1], 1, scores_BK.shape[1], len(read)), 1 / len(read)
        )
        return scores_BK, weights


def matched_width(parameters: int, inputs: int, queries: int) -> int:
    """Returns the width of a head that trains at least as many values as something else.

    Args:
        parameters: of that.
        inputs: width of what the head reads.
        queries: how many scores it gives.
    """
    return max(1, -(-(parameters - queries) // (inputs + 1 + queries)))


class VocabularyReadout(nn.Module):
    """Adds to the voice's stream what it hears of the nodes read; nothing at the start.

    Args:
        output: says width and heads.
        widths: of the nodes read.
        normalize: as in `CrossAttention`.
        voice_width: of the voice's stream.
    """

    def __init__(
        self,
        output: OutputConfig,
        widths: Mapping[str, int],
        normalize: bool,
        voice_width: int,
    ) -> None:
        super().__init__()
        self.attention = CrossAttention(output, widths, normalize)
        self.query = nn.Linear(voice_width, output.width, bias=False)
        self.out = nn.Linear(output.width, voice_width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, shown: Mapping[str, Tensor], voice_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the voice's states with what was heard (B, T, D) and the routing weights (B, H, T, N)."""
        state = voice_BTD.to(self.query.weight.dtype)
        heard_BTD, weights = self.attention(self.query(unit(state)), shown)
        scale = state.square().mean(-1, keepdim=True).sqrt()
        added = (scale * self.out(heard_BTD)).to(voice_BTD.device, voice_BTD.dtype)
        return voice_BTD + added, weights


READOUTS: dict[str, type[nn.Module]] = {"choice": ChoiceReadout, "head": Head}
"""The readouts that choose."""
