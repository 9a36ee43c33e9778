"""Two specialists, the second added to a finished ensemble: its bridges train alone, and it can be cut out again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from rc_agents.benchmarks.methods.bench import Bench, Fitted, NotApplicable
from rc_agents.benchmarks.methods.bridging import (
    closed_form,
    fit_bridges,
    known,
    solve_gates,
    start_bridges,
)
from rc_agents.benchmarks.methods.search import searched
from rc_agents.benchmarks.tasks.transfer import exact

from rc_agents.scoring import CausalScorer

PROBES = 24


def added_later(bench: Bench) -> Fitted:
    """The first specialist's bridges see its own facts; then the second's train alone, on the facts of both."""
    names = list(bench.setting.specialists)
    if len(names) < 2 or len(bench.worlds) < 2:
        raise NotApplicable("the setting has one specialist")
    first, second = names[:2]
    model = bench.couple({first: bench.reference_of(bench.setting.specialists[first])})
    start_bridges(bench, model)
    begun = _train(bench, model, first, 1)
    before = _state(bench, model)
    model.add_specialist(
        second,
        bench.reference_of(bench.setting.specialists[second]),
        dtype=bench.setting.dtype,
        device_map=bench.device,
    )
    start_bridges(bench, model, [(second, "anchor")])
    ended = _train(bench, model, second, 2)
    with model.disabled(second):
        after = _state(bench, model)
    checks = {
        "first_bridges_unchanged": _equal(before["bridges"], after["bridges"]),
        "disabling_second_restores_logits_bit_for_bit": _equal(before["logits"], after["logits"]),
        "disabling_second_restores_answers": before["answers"] == after["answers"],
    }
    search = [
        {**row, "specialist": name}
        for name, fitted in ((first, begun), (second, ended))
        for row in fitted.search
    ]
    return replace(
        ended,
        parameters=begun.parameters + ended.parameters,
        search=search,
        seconds=begun.seconds + ended.seconds,
        notes={**ended.notes, "checks": checks, "first_alone": before["exact"]},
    )


def _train(bench: Bench, model: Any, name: str, count: int) -> Fitted:
    """Trains one specialist's bridges on the facts of the first `count` worlds, with the recipe's search."""
    worlds = bench.worlds[:count]
    pairs, retained = bench.pairs(worlds), bench.retained(worlds)
    part = replace_worlds(bench, count)
    gates = solve_gates(bench, model, known(bench, model.specialists), retained, only=name)
    if bench.recipe.solved:
        return closed_form(model, **gates)
    own = [value for key, value in model.trainable_parameters() if f"{name}__anchor" in key]
    start = [value.detach().clone() for value in own]

    def fit(rate: float, steps: int | None) -> Fitted:
        with torch.no_grad():
            for value, begun in zip(own, start, strict=True):
                value.copy_(begun)
        result = fit_bridges(
            model,
            pairs,
            retained,
            bench.setting,
            bench.seed,
            bench.states,
            config=bench.training(rate, steps),
            only=name,
        )
        return Fitted(
            scorer=CausalScorer(model, trained_parameters=result.trained_parameters),
            parameters=result.trained_parameters,
            steps=result.steps,
            notes={"loss": result.loss, **gates},
            model=model,
        )

    return searched(part, bench.recipe.rates, fit)


def replace_worlds(bench: Bench, count: int) -> Bench:
    """Returns a bench that validates on the first `count` worlds alone, over the same models."""
    part = Bench(
        replace(bench.setting, worlds=bench.setting.worlds[:count]),
        bench.seed,
        bench.folder,
        bench.device,
    )
    part.__dict__["frozen"] = bench.frozen
    return part


@torch.inference_mode()
def _state(bench: Bench, model: Any) -> dict[str, Any]:
    """What the first specialist's ensemble is: its bridges, its logits and answers about its own world."""
    one = bench.exams[0]
    items = one.sets["held_out"]
    scorer = CausalScorer(model)
    prompts = [item.prompt for item in items[:PROBES]]
    ids = [
        model.tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        for prompt in prompts
    ]
    first = model.specialists[0]
    found = exact(scorer, items, one, model.tokenizer)["outcomes"]
    return {
        "bridges": [
            value.detach().clone()
            for key, value in model.trainable_parameters()
            if f"{first}__anchor" in key
        ],
        "logits": [model(row, logits_to_keep=1).logits for row in ids],
        "answers": scorer.generate(prompts, 16),
        "exact": {"outcomes": found},
    }


def _equal(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
