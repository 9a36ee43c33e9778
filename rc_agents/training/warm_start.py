"""Bridges by closed form: ridge regression between two models' states, from a few thousand tokens of any text.

For an edge j -> i at a site, W = argmin sum_t |W n(h_j,t) - n(h_i,t)|^2 + lambda |W|^2 with n the RMS norm. Only the
normal equations are kept (memory d^2, not tokens); they are solved in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rc_agents.bridges.linear import LinearMap
from rc_agents.errors import TrainingError
from rc_agents.execution.exchange import EXCHANGE, Exchange
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import Edge


@dataclass
class NormalEquations:
    """Running sums of one bridge's regression, in float64.

    Attributes:
        xx: sum of x x^T over tokens, (D_source, D_source).
        yx: sum of y x^T, (D_target, D_source).
        count: tokens seen.
    """

    xx: Tensor
    yx: Tensor
    count: int = 0

    def add(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """Takes in N tokens."""
        self.xx += x_ND.T @ x_ND
        self.yx += y_ND.T @ x_ND
        self.count += len(x_ND)

    def solve(self, ridge: float) -> Tensor:
        """Returns W, (D_target, D_source); `ridge` is lambda as a share of the mean squared source value."""
        scale = float(self.xx.diagonal().mean())
        eye = torch.eye(len(self.xx), dtype=self.xx.dtype)
        return torch.linalg.solve(self.xx + ridge * scale * eye, self.yx, left=False)


@dataclass
class _Recorder:
    """Collects what every bridge would read and write, while nobody speaks.

    Attributes:
        sums: by edge and site.
        keep: (B, T), the anchor's tokens that count.
        apart: the models whose tokens are not the anchor's; of theirs all count that read something.
    """

    sums: dict[tuple[Edge, int], NormalEquations] = field(default_factory=dict)
    keep: Tensor | None = None
    apart: Sequence[str] = ()

    def exchange(self, *arguments: Any) -> _RecordingExchange:
        made = _RecordingExchange(*arguments)
        made.recorder = self
        return made

    def add(self, edge: Edge, site: int, source_BTD: Tensor, target_BTD: Tensor) -> None:
        x, y = (_normalised(h.reshape(-1, h.shape[-1])) for h in (source_BTD, target_BTD))
        used = source_BTD.reshape(-1, source_BTD.shape[-1]).ne(0).any(-1).cpu()
        if self.keep is not None and edge.target not in self.apart:
            used &= self.keep.reshape(-1)
        if (edge, site) not in self.sums:
            self.sums[edge, site] = NormalEquations(
                x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(y.shape[1], x.shape[1])
            )
        self.sums[edge, site].add(x[used], y[used])


class _RecordingExchange(Exchange):
    recorder: _Recorder

    def __call__(self, site: int, states: dict[str, Tensor]) -> Mapping[str, Tensor]:
        shown = self._show(site, states)
        for edge in self.edges:
            if edge.target in states:
                self.recorder.add(
                    edge,
                    site,
                    self._source(edge, states, shown, states[edge.target]),
                    states[edge.target],
                )
        return states


def _normalised(h_ND: Tensor) -> Tensor:
    h = h_ND.detach().cpu().double()
    return h / (h.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)


@torch.no_grad()
def warm_start(
    model: CoupledForCausalLM,
    texts: Sequence[str],
    *,
    edges: Sequence[Edge | tuple[str, str]] | None = None,
    ridge: float = 1e-3,
    scale: float = 1.0,
    max_length: int = 256,
    batch_size: int = 8,
    skip: int = 1,
    progress: bool = True,
) -> dict[str, float]:
    """Sets linear bridges to the ridge solution between the frozen models' own states.

    Args:
        model: an ensemble with linear bridges that normalise their source.
        texts: any text; a few thousand tokens do.
        edges: the edges to set; all where left out. The others keep every bit.
        ridge: lambda, as a share of the mean squared source value.
        scale: factor on the solution.
        max_length: tokens of each text.
        skip: leading tokens left out, whose states are outliers.

    Returns:
        `source__target.site` -> share of the target's variance that the fit explains.

    Raises:
        TrainingError: no text, no tokenizer, or bridges of another kind.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise TrainingError("warm_start needs the anchor's tokenizer; pass tokenizers= to couple")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TrainingError("warm_start got no text; pass a few thousand tokens of any text")
    if not model.edges:
        raise TrainingError("warm_start sets bridges, and this ensemble has none")
    chosen = [Edge(*edge) for edge in edges] if edges is not None else list(model.edges)
    for edge in chosen:
        if not isinstance(model.bridge(edge, 0).map, LinearMap):
            raise TrainingError(
                f"warm_start solves for linear bridges, but {edge.source}->{edge.target} has another kind"
            )
    recorder = _Recorder(apart=model.config.span_names)
    token = EXCHANGE.set(recorder.exchange)
    try:
        for start in tqdm(
            range(0, len(texts), batch_size), desc="warm start", disable=not progress
        ):
            ids, mask = _batch(tokenizer, texts[start : start + batch_size], max_length)
            recorder.keep = mask.bool().clone()
            recorder.keep[:, :skip] = False
            model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_to_keep=1,
                output_steered=True,  # so that every model runs, those too that nobody hears
            )
    finally:
        EXCHANGE.reset(token)
    return {
        f"{e.key}.{s}": _set(model, e, s, recorder.sums[e, s], ridge, scale)
        for e, s in recorder.sums
        if e in chosen
    }


def _batch(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
    rows = [tokenizer(text, truncation=True, max_length=max_length).input_ids for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def _set(
    model: CoupledForCausalLM,
    edge: Edge,
    site: int,
    sums: NormalEquations,
    ridge: float,
    scale: float,
) -> float:
    weight = sums.solve(ridge)
    bridge = model.bridge(edge, site)
    bridge.map.weight.copy_(scale * weight)
    total = sums.count * weight.shape[0]  # y is RMS-normalised: its squares sum to one a value
    residual = (
        total - 2 * float((weight * sums.yx).sum()) + float(((weight @ sums.xx) * weight).sum())
    )
    return 1 - residual / total
