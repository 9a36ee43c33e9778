"""How bridges are made: the start that the recipe names, then the trainer, on stored states where it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.methods.bench import Bench, Fitted, NotApplicable
from rc_agents.benchmarks.methods.search import searched
from rc_agents.benchmarks.settings import Setting
from rc_agents.benchmarks.tasks.items import documents

from rc_agents.scoring import CausalScorer
from rc_agents.training import data
from rc_agents.training.bridges import TrainConfig, TrainResult, train
from rc_agents.training.gate_start import start_gates
from rc_agents.training.vocabulary_start import set_vocabulary_start
from rc_agents.training.warm_start import gather, set_start


def start_bridges(bench: Bench, model: Any, edges: Sequence[Any] | None = None) -> None:
    """Sets the maps of some edges (all by default) to the recipe's start."""
    recipe = bench.recipe
    chosen = list(model.edges if edges is None else edges)
    if recipe.carrier in ("ridge", "vocabulary"):
        fits = gather(model, documents("train", recipe.start_documents), progress=False)
    if recipe.carrier == "vocabulary":
        told = known(bench, model.specialists)
        for edge in chosen:
            answers = [pair.completion for pair in told.get(edge[0], [])]
            set_vocabulary_start(model, fits, edges=[edge], answers=answers, scale=recipe.scale)
    elif recipe.carrier == "ridge":
        set_start(
            model,
            fits,
            edges=chosen,
            carrier="identity" if recipe.own else "ridge",
            ridge=recipe.ridge,
            scale=recipe.scale,
            own=recipe.own,
        )
    elif recipe.scale != 1.0:
        with torch.no_grad():
            for edge in chosen:
                for site in range(len(model.sites)):
                    model.bridge(edge, site).map.weight.mul_(recipe.scale)


def known(bench: Bench, names: Sequence[str]) -> dict[str, list[data.Pair]]:
    """Returns by specialist the pairs that it answers: the first specialists know one world each."""
    return {name: bench.pairs([world]) for name, world in zip(names, bench.worlds, strict=False)}


def solve_gates(
    bench: Bench,
    model: Any,
    speak: Mapping[str, Sequence[data.Pair]],
    retained: Sequence[data.Record],
    only: str | None = None,
) -> dict[str, Any]:
    """Sets token gates by logistic regression where the recipe says so; returns how well they do.

    Args:
        bench: whose recipe says how.
        model: an ensemble whose edges all lead into the anchor.
        speak: by specialist, the pairs that it answers.
        retained: where nobody should speak; strangers are left to training unless the recipe says otherwise.
        only: the one specialist whose gates are set; all where left out.
    """
    recipe = bench.recipe
    if recipe.gates is None:
        return {}
    silent = gate_negatives(bench, retained)
    fits = start_gates(
        model,
        speak,
        silent,
        bench.states,
        penalty=recipe.gates,
        quiet=recipe.quiet,
        whole_prompts=recipe.whole_prompts,
        only=only,
        progress=False,
    )
    return {"gates": {key: vars(fit) for key, fit in fits.items()}}


def gate_negatives(bench: Bench, retained: Sequence[data.Record]) -> list[data.Record]:
    """Returns the retained examples on which gates are shut: strangers only where the recipe says so."""
    with_strangers = bench.recipe.strangers
    return [one for one in retained if with_strangers or getattr(one, "group", "") != "strangers"]


def fit_bridges(
    model: Any,
    pairs: Sequence[data.Record],
    retained: Sequence[data.Record],
    setting: Setting,
    seed: int,
    states_folder: Path | None,
    *,
    config: TrainConfig | None = None,
    only: str | None = None,
) -> TrainResult:
    """Trains bridges in place, from where they are.

    Args:
        model: an ensemble.
        pairs, retained: the training data.
        setting: whose recipe says how.
        seed: of the order of the data, where no config is given.
        states_folder: where hidden states are kept, for unilateral topologies; None to compute them in every step.
        config: the recipe's with another learning rate or other steps.
        only: the one specialist whose bridges train; all where left out.
    """
    if config is None:
        recipe = setting.recipe.train
        config = TrainConfig(**{**vars(recipe), "seed": seed})
    constant = bool(model.edges) and all(edge.target == "anchor" for edge in model.edges)
    options: dict[str, Any] = {}
    if constant and states_folder is not None:
        options["states"] = states_folder
    if only is not None:
        options["only"] = only
    if config.retain_weight:
        options["retain"] = retained
    return train(model, pairs, None, config, progress=False, **options)


def closed_form(model: Any, **notes: Any) -> Fitted:
    """Returns an ensemble whose bridges are solved for, without a step of training."""
    count = sum(value.numel() for _, value in model.trainable_parameters())
    return Fitted(
        scorer=CausalScorer(model, trained_parameters=count),
        parameters=count,
        notes={"sites": model.sites, **notes},
        model=model,
    )


def fitted_bridges(
    bench: Bench,
    model: Any,
    *,
    states: bool = True,
    solved: bool = False,
    gates: bool = True,
    **notes: Any,
) -> Fitted:
    """Searches the learning rate of an ensemble's bridges; returns the ensemble with the best.

    Args:
        bench: data, recipe and judge.
        model: the ensemble, trained in place.
        states: whether to keep hidden states on disk.
        solved: leave the bridges at the recipe's start.
        gates: whether to solve the gates as the recipe says; no where they read nothing.
        notes: what else belongs in the record.
    """
    if bench.recipe.edge_bridges:
        raise NotApplicable("the recipe's bridges are solved one after another, for its own models")
    start_bridges(bench, model)
    if gates:
        notes |= solve_gates(bench, model, known(bench, model.specialists), bench.retained())
    if solved:
        return closed_form(model, **notes)
    start = [parameter.detach().clone() for _, parameter in model.trainable_parameters()]
    pairs, retained = bench.lessons(), bench.retained()

    def fit(rate: float, steps: int | None) -> Fitted:
        with torch.no_grad():
            each = model.trainable_parameters()
            for (_, parameter), value in zip(each, start, strict=True):
                parameter.copy_(value)
        config = bench.training(rate, steps)
        folder = bench.states if states else None
        result = fit_bridges(
            model, pairs, retained, bench.setting, bench.seed, folder, config=config
        )
        return Fitted(
            scorer=CausalScorer(model, trained_parameters=result.trained_parameters),
            parameters=result.trained_parameters,
            steps=result.steps,
            notes={"loss": result.loss, "sites": model.sites, **notes},
            model=model,
        )

    return searched(bench, bench.recipe.rates, fit)
