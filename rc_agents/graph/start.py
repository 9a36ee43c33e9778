"""A start in closed form: nodes write what the nodes that hear them would think, before a single step of training.

For the nodes t that hear at a level, Y = [n(h_t)] are their own states where they hear, and C the first principal
directions of Y, as many as the latent space has. Then, each a ridge regression in float64,

    E_s = argmin sum |E n(p_s) - C y|^2 + lambda |E|^2        every node s that they hear
    I_t = argmin sum |I z - n(h_t)|^2 + lambda |I|^2          z the aggregate of what was written

so that all nodes speak of the same directions, and what is injected is of the kind that the stream holds. Shapes: N
texts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from ..training.closed_form import NormalEquations
from .asking import Asked, OneRun, texts_by_node
from .latent import Hear, unit
from .model import LatentGraph
from .signals import Signals, WholeRun


@dataclass(frozen=True)
class Started:
    """How well projections are explained.

    Attributes:
        encode: by node that is heard, the share of the latent code that its state explains.
        hear: by node that hears, the share of its own state that the aggregate explains.
    """

    encode: dict[str, float]
    hear: dict[str, float]


@torch.no_grad()
def ridge_start(
    graph: LatentGraph,
    asked: Sequence[Asked],
    *,
    run_of: OneRun | None = None,
    strength: float = 1e-2,
    batch_size: int = 32,
) -> Started:
    """Sets encode and injection edges by closed form; the output is left as it is.

    Args:
        graph: with a latent space.
        asked: some hundred questions, as `asking.ask` makes them; their labels are not read.
        run_of: where states come from; the models themselves where left out.
        strength: lambda, as a share of the mean squared value that is regressed on.
        batch_size: questions a pass.

    Raises:
        TrainingError: the graph has no latent space, or there are no questions.
    """
    if not graph.encode:
        raise TrainingError("ridge_start sets edges through a latent space; this graph has none")
    if not asked:
        raise TrainingError("ridge_start needs some questions to read; got none")
    away = sorted(set(graph.hear) & set(graph.remote))
    if away:
        raise TrainingError(
            f"ridge_start reads the stream of every node that hears; load {away[0]!r} in this process"
        )
    with graph.complete():
        return _started(graph, asked, run_of, strength, batch_size)


def _started(
    graph: LatentGraph,
    asked: Sequence[Asked],
    run_of: OneRun | None,
    strength: float,
    batch_size: int,
) -> Started:
    encode: dict[str, float] = {}
    hear: dict[str, float] = {}
    for level in graph.config.levels[1:]:
        targets = [name for name in level if name in graph.hear]
        shown, own = _seen(graph, asked, targets, run_of, batch_size)
        code_ND = _principal(
            torch.cat([own[name] for name in targets], 1), graph.config.latent.width
        )
        for name in {one: None for target in targets for one in graph.config.nodes[target].hears}:
            if name not in encode:
                read_ND = unit(shown[name]) if graph.config.latent.normalize else shown[name]
                encode[name] = _fit(graph.encode[name].map.weight, read_ND, code_ND, strength)
        written: dict[str, Any] = {
            name: graph.encode[name](one).cpu()
            for name, one in shown.items()
            if name in graph.encode
        }
        for name in targets:
            module = graph.hear[name]
            assert isinstance(module, Hear)
            z_ND = module.latent(written)[0]
            hear[name] = _fit(module.map.weight, z_ND, own[name], strength)
    return Started(encode, hear)


def _seen(
    graph: LatentGraph,
    asked: Sequence[Asked],
    targets: Sequence[str],
    run_of: OneRun | None,
    batch_size: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns what all nodes below the targets show, and the targets' own states where they hear, (N, D) each."""
    needed = _below(graph, targets)
    shown: dict[str, list[Tensor]] = {}
    own: dict[str, list[Tensor]] = {name: [] for name in targets}
    for start in range(0, len(asked), batch_size):
        texts = texts_by_node(asked[start : start + batch_size])
        run = run_of(texts) if run_of is not None else None
        run = run or WholeRun(graph.nodes, graph.read_texts(texts))
        signals: Signals = graph.signals(run, needed)
        for name, one in signals.shown.items():
            shown.setdefault(name, []).append(one.cpu())
        for name in targets:

            def note(heard_BTD: Tensor, name: str = name) -> Tensor:
                own[name].append(unit(heard_BTD[:, -1].float()).cpu())
                return torch.zeros_like(heard_BTD)

            run.states(name, note)
    joined = [{name: torch.cat(each) for name, each in found.items()} for found in (shown, own)]
    return joined[0], joined[1]


def _below(graph: LatentGraph, targets: Sequence[str]) -> set[str]:
    """Returns the nodes whose states reach the targets."""
    needed: set[str] = set()
    ahead = {one for name in targets for one in graph.config.nodes[name].hears}
    while ahead - needed:
        needed |= ahead
        ahead = {one for name in ahead for one in graph.config.nodes[name].hears}
    return needed


def _principal(states_ND: Tensor, width: int) -> Tensor:
    """Returns the states in their first principal directions, RMS 1 over all, (N, width); zeros beyond their rank."""
    states = states_ND.double()
    directions = torch.linalg.eigh(states.T @ states).eigenvectors[:, -width:].flip(1)
    code = states @ directions
    if code.shape[1] < width:
        code = torch.nn.functional.pad(code, (0, width - code.shape[1]))
    return code / code.square().mean().sqrt().clamp(min=1e-12)


def _fit(weight: Tensor, x_ND: Tensor, y_ND: Tensor, strength: float) -> float:
    """Puts the ridge map from x to y into a weight; returns the share of y that it explains."""
    sums = NormalEquations.empty(x_ND.shape[1], y_ND.shape[1])
    sums.add(x_ND.double(), y_ND.double())
    found = sums.ridge(strength)
    weight.copy_(found)
    return sums.explained(found)
