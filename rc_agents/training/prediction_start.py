"""Maps of bridges that read a prediction: from a token's embedding to what the target makes of that token by its site.

Such a bridge hands over a soft token, a mean of input embeddings; the target is to go on as if it had read it. Its own
states say how: over some text, the state behind the site's block is regressed on the embedding of the token that was
read, W = argmin sum |h - W e|^2 + lambda |W|^2, from streaming sums in float64. Nothing about the source is needed.
Shapes: N tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rc_agents.backbone import find_blocks
from rc_agents.bridges.linear import LinearMap
from rc_agents.errors import TrainingError
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import Edge
from rc_agents.training.data import read

SKIP = 1  # first tokens of a text, whose states are unlike all others


class _Reached(Exception):
    """The block is reached; the rest of the model need not run."""


@torch.no_grad()
def set_prediction_start(
    model: CoupledForCausalLM,
    edge: Edge | tuple[str, str],
    site: int,
    texts: Any,
    *,
    ridge: float = 1e-4,
    max_length: int = 256,
) -> float:
    """Sets the map of one bridge.

    Args:
        model: the ensemble; nothing but this map changes.
        edge: whose bridge reads predictions through a linear map.
        site: index into `model.sites`.
        texts: documents, as `rc_agents.training.data.read` takes them; a few hundred.
        ridge: lambda, as a share of the mean squared entry of the embeddings.
        max_length: tokens taken of each text.

    Returns:
        The share of the states' variance that the map explains on these texts.

    Raises:
        TrainingError: a bridge of another form than one that blends without normalisation, no tokenizer, or texts
            without tokens.
    """
    edge = Edge(*edge)
    bridge: Any = model.bridge(edge, site)
    if bridge.reading is None or not isinstance(bridge.map, LinearMap):
        raise TrainingError(
            f"{edge.source}->{edge.target} does not read predictions through a linear map; couple with "
            "edge_bridges={...: BridgeConfig(reads='prediction', ...)}"
        )
    if not bridge.blends or bridge.normalize_source:
        raise TrainingError(
            f"{edge.source}->{edge.target} is to go on from what it hears: set_prediction_start is made for "
            "BridgeConfig(update='blend', normalize_source=False)"
        )
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise TrainingError("set_prediction_start reads text and needs the anchor's tokenizer")
    target = model.models[edge.target]
    layer = model.sites[site][model.names.index(edge.target)]
    embedding: Any = target.get_input_embeddings()
    width = embedding.weight.shape[1]
    xx, yx = torch.zeros(2, width, width, dtype=torch.float64)
    total, count = torch.zeros(width + 1, dtype=torch.float64), 0
    for record in read(texts):
        ids = tokenizer(getattr(record, "text", "")).input_ids[:max_length]
        if len(ids) <= SKIP:
            continue
        row = torch.tensor([ids], device=embedding.weight.device)
        y_ND = _states(target, layer, row)[0, SKIP:].double().cpu()
        x_ND = embedding.weight[row[0, SKIP:]].double().cpu()
        xx += x_ND.T @ x_ND
        yx += y_ND.T @ x_ND
        total[:-1] += y_ND.sum(0)
        total[-1] += y_ND.square().sum()
        count += len(y_ND)
    if not count:
        raise TrainingError("set_prediction_start got no text; pass some documents")
    penalty = ridge * xx.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    weight = torch.linalg.solve(xx + penalty, yx.T).T
    bridge.map.weight.copy_(weight)
    missed = total[-1] - 2 * (weight * yx).sum() + ((weight @ xx) * weight).sum()
    spread = total[-1] - total[:-1].square().sum() / count
    return float(1 - missed / spread)


def _states(target: Any, layer: int, ids: Tensor) -> Tensor:
    """Returns the states (1, T, D) behind a block of one model; what lies behind the block does not run."""
    caught: list[Tensor] = []

    def catch(module: Any, args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = find_blocks(target)[layer - 1].register_forward_hook(catch)
    try:
        target(ids, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]
