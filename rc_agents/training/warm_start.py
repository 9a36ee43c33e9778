"""Bridges by closed form, from a few thousand tokens of any text.

For an edge j -> i at a site, R = argmin sum_t |R n(h_j,t) - n(h_i,t)|^2 + lambda |R|^2 with n the RMS norm predicts the
target's own state from the source's. A bridge starts at

    W = scale * A - own * R

where A carries the source over: R itself (`ridge`), the nearest orthogonal map (`procrustes`) or, between models of one
width and one space, the identity. With `own` = 1 the target's own state is taken away as far as the source can tell it,
so an open gate puts what the source knows in its place instead of on top. Only the normal equations are kept (memory
d^2, not tokens); they are solved in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rc_agents.bridges.linear import LinearMap
from rc_agents.bridges.low_rank import LowRankMap
from rc_agents.errors import TrainingError, nearest
from rc_agents.execution.exchange import EXCHANGE, Exchange
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import Edge
from rc_agents.training.closed_form import NormalEquations

CARRIERS = ("ridge", "procrustes", "identity")
_NO_TEXT = (
    "warm_start learns from text, and {!r} is an encoder, which reads none: train its bridges"
)


@dataclass
class Fits:
    """What was gathered for each edge and site; starts can be set from it again and again.

    Attributes:
        sums: by edge and site.
    """

    sums: dict[tuple[Edge, int], NormalEquations] = field(default_factory=dict)
    keep: Tensor | None = None
    apart: Sequence[str] = ()

    def exchange(self, *arguments: Any) -> _RecordingExchange:
        """Makes a pass's exchange in which nobody speaks and everything is gathered."""
        made = _RecordingExchange(*arguments)
        made.fits = self
        return made

    def add(self, edge: Edge, site: int, source_BTD: Tensor, target_BTD: Tensor) -> None:
        """Takes in the states at one site; of models with the anchor's tokens those that `keep` marks, (B, T)."""
        x, y = (_normalised(h.reshape(-1, h.shape[-1])) for h in (source_BTD, target_BTD))
        used = source_BTD.reshape(-1, source_BTD.shape[-1]).ne(0).any(-1).cpu()
        if self.keep is not None and edge.target not in self.apart:
            used &= self.keep.reshape(-1)
        if (edge, site) not in self.sums:
            self.sums[edge, site] = NormalEquations.empty(x.shape[1], y.shape[1])
        self.sums[edge, site].add(x[used], y[used])


class _RecordingExchange(Exchange):
    fits: Fits

    def __call__(self, site: int, states: dict[str, Tensor]) -> Mapping[str, Tensor]:
        shown = self._show(site, states)
        for edge in self.edges:
            if edge.target in states:
                read = self._source(edge, site, states, shown, states[edge.target])
                self.fits.add(edge, site, read, states[edge.target])
        return states


def _normalised(h_ND: Tensor) -> Tensor:
    h = h_ND.detach().cpu().double()
    return h / (h.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)


@torch.no_grad()
def gather(
    model: CoupledForCausalLM,
    texts: Sequence[str],
    *,
    max_length: int = 256,
    batch_size: int = 8,
    skip: int = 1,
    progress: bool = True,
) -> Fits:
    """Runs the frozen models over texts and returns what the starts of all bridges are solved from.

    Args:
        model: an ensemble.
        texts: any text; a few thousand tokens do.
        max_length: tokens of each text.
        batch_size: texts a pass.
        skip: leading tokens left out, whose states are outliers.
        progress: show a bar.

    Raises:
        TrainingError: no text, no tokenizer, or no bridges.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise TrainingError("warm_start needs the anchor's tokenizer; pass tokenizers= to couple")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TrainingError("warm_start got no text; pass a few thousand tokens of any text")
    if not model.edges:
        raise TrainingError("warm_start sets bridges, and this ensemble has none")
    encoders = [edge.source for edge in model.edges if edge.source in model.config.encoder_names]
    if len(encoders) == len(model.edges):
        raise TrainingError(_NO_TEXT.format(encoders[0]))
    fits = Fits(apart=model.config.span_names)
    token = EXCHANGE.set(fits.exchange)
    starts = range(0, len(texts), batch_size)
    try:
        for start in tqdm(starts, desc="warm start", disable=not progress):
            ids, mask = _batch(tokenizer, texts[start : start + batch_size], max_length)
            fits.keep = mask.bool().clone()
            fits.keep[:, :skip] = False
            model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_to_keep=1,
                output_steered=True,  # so that every model runs, those too that nobody hears
            )
    finally:
        EXCHANGE.reset(token)
    return fits


@torch.no_grad()
def set_start(
    model: CoupledForCausalLM,
    fits: Fits,
    *,
    edges: Sequence[Edge | tuple[str, str]] | None = None,
    carrier: str = "ridge",
    scale: float = 1.0,
    own: float = 0.0,
    ridge: float = 1e-3,
) -> dict[str, float]:
    """Sets bridges to W = scale * A - own * R, low-rank ones to the nearest map of their rank.

    Args:
        model: the ensemble that `fits` was gathered from.
        fits: what `gather` returned.
        edges: the edges to set; all where left out. The others keep every bit.
        carrier: A: `ridge`, `procrustes`, or `identity` (models of one width that share a base).
        scale: factor on A.
        own: share of the target's own state, as the source predicts it, that is taken away.
        ridge: lambda, as a share of the mean squared source value.

    Returns:
        `source__target.site` -> share of the target's variance that R (or the orthogonal map) explains.

    Raises:
        TrainingError: an unknown carrier, bridges of a kind without a closed form, or widths that differ.
    """
    if carrier not in CARRIERS:
        raise TrainingError(f"unknown carrier {carrier!r}; {nearest(carrier, CARRIERS)}")
    reading = [edge for edge in model.edges if edge.source not in model.config.encoder_names]
    chosen = [Edge(*edge) for edge in edges] if edges is not None else reading
    for edge in chosen:
        if edge.source in model.config.encoder_names:
            raise TrainingError(_NO_TEXT.format(edge.source))
        if model.bridge(edge, 0).reading is not None:
            raise TrainingError(
                f"{edge.source}->{edge.target} reads predictions, not states: use set_prediction_start"
            )
        if not isinstance(model.bridge(edge, 0).map, LinearMap | LowRankMap):
            raise TrainingError(
                "warm_start solves for linear and low-rank bridges, but "
                f"{edge.source}->{edge.target} has another kind"
            )
    return {
        f"{edge.key}.{site}": _set(
            model, edge, site, fits.sums[edge, site], carrier, scale, own, ridge
        )
        for edge, site in fits.sums
        if edge in chosen
    }


def warm_start(
    model: CoupledForCausalLM,
    texts: Sequence[str],
    *,
    edges: Sequence[Edge | tuple[str, str]] | None = None,
    carrier: str = "ridge",
    ridge: float = 1e-3,
    scale: float = 1.0,
    own: float = 0.0,
    max_length: int = 256,
    batch_size: int = 8,
    skip: int = 1,
    progress: bool = True,
) -> dict[str, float]:
    """Gathers and sets in one go; arguments and errors as in `gather` and `set_start`."""
    fits = gather(
        model, texts, max_length=max_length, batch_size=batch_size, skip=skip, progress=progress
    )
    return set_start(model, fits, edges=edges, carrier=carrier, scale=scale, own=own, ridge=ridge)


def choose_start(
    model: CoupledForCausalLM,
    fits: Fits,
    score: Callable[[], float],
    *,
    edges: Sequence[Edge | tuple[str, str]] | None = None,
    carriers: Sequence[str] = ("ridge",),
    scales: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    owns: Sequence[float] = (0.0, 1.0),
    ridge: float = 1e-3,
) -> dict[str, Any]:
    """Tries every start of a grid and leaves the bridges at the best.

    Fit quality does not predict behaviour, so the score should be the task's own, on validation data.

    Args:
        model, fits, edges, ridge: as in `set_start`.
        score: what the ensemble is worth as it stands; less is better, such as a validation loss.
        carriers, scales, owns: the grid.

    Returns:
        The best `carrier`, `scale`, `own` and `score`, and all that were `tried`.
    """
    tried: list[dict[str, Any]] = []
    for carrier, scale, own in itertools.product(carriers, scales, owns):
        setting: dict[str, Any] = {"carrier": carrier, "scale": scale, "own": own}
        set_start(model, fits, edges=edges, ridge=ridge, **setting)
        tried.append(setting | {"score": score()})
    best = min(tried, key=lambda one: one["score"])
    setting = {name: best[name] for name in ("carrier", "scale", "own")}
    set_start(model, fits, edges=edges, ridge=ridge, **setting)
    return best | {"tried": tried}


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
    carrier: str,
    scale: float,
    own: float,
    ridge: float,
) -> float:
    predicted = sums.ridge(ridge)
    carried = _carried(sums, predicted, carrier, edge)
    weight = scale * carried - own * predicted
    bridge = model.bridge(edge, site)
    if isinstance(bridge.map, LowRankMap):
        up, down = sums.reduced_rank(weight, bridge.map.up.weight.shape[1])
        bridge.map.up.weight.copy_(up)
        bridge.map.down.weight.copy_(down)
    else:
        bridge.map.weight.copy_(weight)
    return sums.explained(carried if carrier == "procrustes" else predicted)


def _carried(sums: NormalEquations, predicted: Tensor, carrier: str, edge: Edge) -> Tensor:
    if carrier == "ridge":
        return predicted
    if carrier == "procrustes":
        return sums.procrustes()
    if predicted.shape[0] != predicted.shape[1]:
        raise TrainingError(
            f"carrier='identity' needs models of equal width, {edge.source}->{edge.target} has "
            f"{predicted.shape[1]} and {predicted.shape[0]}; use 'ridge' or 'procrustes'"
        )
    return torch.eye(len(predicted), dtype=predicted.dtype)
