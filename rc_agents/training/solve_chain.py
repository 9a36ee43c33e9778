"""A chain of specialists, solved for: each goes on from what the one before would say, the anchor from the last.

The first knows who lives where, the second which word belongs to a town. Asked for the word of somebody's town, the
first one's answer enters the second as a soft token (bridges with `reads="prediction"`), and the second one's last
state takes the place of the anchor's. All of it happens at the prompt's last token, in one pass; gates say when.
docs/training.md shows the ensemble this is made for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rc_agents.bridges import TokenGate
from rc_agents.errors import TrainingError
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import ANCHOR, Edge
from rc_agents.training import data
from rc_agents.training.gate_start import SHUT, GateFit, Part, fit_gate, read_bridge, thinned
from rc_agents.training.prediction_start import set_prediction_start


def solve_chain(
    model: CoupledForCausalLM,
    chains: Any,
    silent: Any,
    texts: Any = None,
    *,
    penalty: float = 1e-3,
    quiet: float = 0.9995,
    max_length: int = 256,
    block_length: int = 128,
) -> dict[str, GateFit]:
    """Solves the bridges of a chain in the order in which they speak: the maps of predictions, then each gate.

    Args:
        model: an ensemble whose edges are a path into the anchor, with as many sites, edge k acting at site k; all but
            the last read predictions; its gates are token gates with a floor, and are shut at all other sites.
        chains: questions whose answers take the whole chain, some hundred, in a dozen phrasings.
        silent: texts, and pairs of the anchor's own, on which nobody should speak.
        texts: documents that say what the targets make of a token; those in `silent` where left out.
        penalty, quiet: of the gates, as in `start_gates`.
        max_length, block_length: tokens of the longest pair, and of a block of text.

    Returns:
        `source__target.site` -> how well its gate does on its own examples.

    Raises:
        TrainingError: another topology or form of bridge, or no examples.
    """
    edges = _path(model)
    sizes = {"max_length": max_length, "block_length": block_length}
    quiet_records, questions = data.read(silent), data.read(chains)
    if any(isinstance(one, data.Document) for one in questions):
        raise TrainingError("solve_chain takes chains as questions and answers; there is a text")
    texts = quiet_records if texts is None else data.read(texts)
    if not any(isinstance(one, data.Document) for one in texts):
        raise TrainingError("solve_chain got no general text; pass some documents in silent")
    asked = data.encode(model.tokenizer, questions, **sizes)
    kept = data.encode(model.tokenizer, quiet_records, **sizes)
    _shut(model, edges)
    for site, edge in enumerate(edges[:-1]):
        set_prediction_start(model, edge, site, texts)
    fits = {}
    for site, edge in enumerate(edges):
        # A middle term has one place, before the answer; the last link says the whole answer.
        last = edge.target == ANCHOR
        speak: Part = "answer" if last else "first"
        still: list[Part] = ["prompt"] if last else ["prompt", "rest"]
        speaks, *keeps = read_bridge(model, edge, site, asked, speak, *still)
        keeps += read_bridge(model, edge, site, kept, "all")
        gate: Any = model.bridge(edge, site).gate
        fits[f"{edge.key}.{site}"] = fit_gate(
            gate, speaks, thinned(_joined(keeps)), penalty, 1.0, quiet
        )
    return fits


def _path(model: CoupledForCausalLM) -> list[Edge]:
    """Returns the edges in the order in which they speak, or says why they cannot be solved for."""
    into = {edge.target: edge for edge in model.edges}
    found: list[Edge] = []
    end = ANCHOR
    if model.tokenizer is None:
        raise TrainingError("solve_chain reads text and needs the anchor's tokenizer")
    while end in into and len(found) < len(model.edges):
        found.insert(0, into[end])
        end = into[end].source
    shown = ", ".join(f"{edge.source}->{edge.target}" for edge in model.edges) or "none"
    if not found or len(found) < len(model.edges) or len(into) < len(model.edges):
        raise TrainingError(f"solve_chain solves one path into the anchor; the edges are {shown}")
    if len(model.sites) != len(found):
        raise TrainingError(
            f"solve_chain needs a site for each edge of the chain: {len(found)} edges ({shown}), "
            f"{len(model.sites)} sites"
        )
    for site, edge in enumerate(found):
        bridge: Any = model.bridge(edge, site)
        if not isinstance(bridge.gate, TokenGate) or not bridge.gate.floor:
            raise TrainingError(
                "solve_chain sets token gates that can be shut: couple with gate='token' and a gate_floor"
            )
        if (bridge.reading is None) != (edge.target == ANCHOR):
            raise TrainingError(
                "in a chain all bridges but those into the anchor read predictions: couple with "
                "edge_bridges={(source, target): BridgeConfig(reads='prediction', ...)} for these alone"
            )
    return found


@torch.no_grad()
def _shut(model: CoupledForCausalLM, edges: Sequence[Edge]) -> None:
    """Shuts the gates of the chain, all of them: what each reads is then as it is without the links behind it."""
    for edge in edges:
        for site in range(len(model.sites)):
            gate: Any = model.bridge(edge, site).gate
            for weight in gate.reads.values():
                weight.zero_()
            gate.value.fill_(math.log(gate.floor / (1 - gate.floor)) - SHUT)


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {end: torch.cat([part[end] for part in parts]) for end in ("source", "target")}
