"""One specialist asks the next inside a pass: the chain's bridges are solved in the order in which they speak.

The first specialist's words enter the second one as a soft token, where the first one is about to name the middle term;
the anchor goes on from the second one's last states, where that is about to answer. Gates see the bridges' chains and
the retained text; no chain that is scored, and no middle term that is kept apart.
"""

from __future__ import annotations

from typing import Any

import torch
from rc_agents.benchmarks.methods.bench import Bench, Fitted
from rc_agents.benchmarks.methods.bridging import closed_form, gate_negatives
from rc_agents.benchmarks.tasks.items import documents
from torch import Tensor

from rc_agents.training import data
from rc_agents.training.gate_start import Part, fit_gate, read_bridge
from rc_agents.training.prediction_start import set_prediction_start


def solved_hops(bench: Bench, model: Any) -> Fitted:
    """Solves the bridges first -> second at the first site and second -> anchor at the last one."""
    first, second = model.specialists
    recipe = bench.recipe
    sizes = {"max_length": 256, "block_length": 128}
    chains = data.encode(model.tokenizer, bench.pairs(), **sizes)
    quiet = data.encode(model.tokenizer, gate_negatives(bench, bench.retained()), **sizes)
    hand, say = ((first, second), 0), ((second, "anchor"), len(model.sites) - 1)
    explained = set_prediction_start(model, *hand, documents("train", recipe.start_documents))
    fits = {}
    # The middle term has one place, before the answer.
    order: list[tuple[Any, Part, list[Part]]] = [
        (hand, "first", ["prompt", "rest"]),
        (say, "answer", ["prompt"]),
    ]
    for (edge, site), speak, silent in order:
        speaks, *keeps = read_bridge(model, edge, site, chains, speak, *silent)
        keeps += read_bridge(model, edge, site, quiet, "all")
        gate = model.bridge(edge, site).gate
        fit = fit_gate(gate, speaks, _joined(keeps), recipe.gates, 1.0, recipe.quiet)
        fits[f"{edge[0]}__{edge[1]}.{site}"] = vars(fit)
    return closed_form(model, gates=fits, explained=explained)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {end: torch.cat([part[end] for part in parts]) for end in ("source", "target")}
