"""The bridges' own map and gate on the anchor's own state: is a second model needed at all?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from rc_agents.benchmarks.methods.bench import Bench, Fitted, NotApplicable
from rc_agents.benchmarks.methods.bridging import known, solve_gates, start_bridges
from rc_agents.benchmarks.methods.search import searched
from rc_agents.benchmarks.methods.tuning import Batch, LastStates, Lessons, tune
from torch import Tensor, nn

import rc_agents
from rc_agents.scoring import CausalScorer
from rc_agents.training.labelled import only_at


def linear_adapter(bench: Bench) -> Fitted:
    """h <- h + gate(h, h) W n(h) behind the blocks of the sites, once for each specialist that the ensemble has.

    It starts as the ensemble's bridges do, its gates solved on the anchor's own states.
    """
    if bench.recipe.edge_bridges:
        raise NotApplicable("the recipe's bridges do not all lead into the anchor")
    anchor = bench.frozen.models["anchor"]
    names = dict.fromkeys(bench.frozen.specialists, anchor)
    tokenizers = {"anchor": bench.tokenizer} | dict.fromkeys(names, bench.tokenizer)
    model = rc_agents.couple(
        anchor,
        names,
        topology="unilateral",
        sites=list(bench.recipe.sites),
        bridge=bench.recipe.bridge,
        tokenizers=tokenizers,
    )
    start_bridges(bench, model)
    notes = solve_gates(bench, model, known(bench, model.specialists), bench.retained())
    bridges = nn.ModuleList(
        nn.ModuleList(model.bridge(edge, site) for edge in model.edges)
        for site in range(len(model.sites))
    )
    own = bench.anchor_copy()
    layers = [row[0] for row in model.sites]
    attach(
        own, {layer: cast(nn.ModuleList, each) for layer, each in zip(layers, bridges, strict=True)}
    )
    start = [parameter.detach().clone() for parameter in bridges.parameters()]
    lessons = Lessons(bench)
    frozen = LastStates([anchor], lessons)

    def logits(batch: Batch) -> Tensor:
        with only_at(own, batch.keep_BT):
            return own(**batch.tensors, use_cache=False).logits[0]

    def fit(rate: float, steps: int | None) -> Fitted:
        with torch.no_grad():
            for parameter, value in zip(bridges.parameters(), start, strict=True):
                parameter.copy_(value)
        config = bench.training(rate, steps)
        gates = [value for name, value in bridges.named_parameters() if ".gate." in name]
        maps = [value for name, value in bridges.named_parameters() if ".gate." not in name]
        loss = tune(
            maps, logits, lambda batch: frozen.logprobs(batch)[0], lessons, config, slow=gates
        )
        count = sum(parameter.numel() for parameter in bridges.parameters())
        return Fitted(
            scorer=CausalScorer(own, bench.tokenizer, trained_parameters=count),
            parameters=count,
            steps=config.steps,
            notes={"loss": loss, "sites": list(bench.recipe.sites), **notes},
        )

    return searched(bench, bench.setting.rates["linear_adapter"], fit)


def attach(model: Any, bridges: Mapping[int, nn.ModuleList]) -> None:
    """Lets blocks of a model, 1-based, be followed by bridges that read and write the model's own state."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    blocks = next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )

    def after(each: nn.ModuleList) -> Any:
        def update(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (_updated(output[0], each), *output[1:])
            return _updated(output, each)

        return update

    for number, each in bridges.items():
        blocks[number - 1].register_forward_hook(after(each))


def _updated(h: Tensor, bridges: nn.ModuleList) -> Tensor:
    heard = h
    for bridge in bridges:
        heard = heard + bridge(h, h, heard)
    return heard
