"""The ensemble: the frozen anchor hears the frozen specialists through trained bridges."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks import files
from rc_agents.benchmarks.methods.bench import Bench, Fitted
from rc_agents.benchmarks.methods.bridging import fitted_bridges
from rc_agents.benchmarks.methods.hops import solved_hops
from safetensors.torch import load_file, save_file

from rc_agents.scoring import CausalScorer


def coupled(bench: Bench) -> Fitted:
    """All specialists, bridges trained together; kept on disk, as the ablations of its sources need it too."""
    return bench.kept("coupled", lambda: _load(bench) or _save(bench, _fit(bench)))


def _fit(bench: Bench) -> Fitted:
    if bench.recipe.edge_bridges:
        return solved_hops(bench, bench.couple())
    return fitted_bridges(bench, bench.couple(), solved=bench.recipe.solved)


def _save(bench: Bench, fitted: Fitted) -> Fitted:
    values = {name: value.detach() for name, value in fitted.model.trainable_parameters()}
    about = {
        name: getattr(fitted, name)
        for name in ("parameters", "steps", "search", "seconds", "notes")
    }
    files.put(
        _place(bench),
        lambda scratch: save_file(values, scratch, metadata={"about": json.dumps(about)}),
    )
    return fitted


def _load(bench: Bench) -> Fitted | None:
    file = _place(bench)
    if not file.exists():
        return None
    model = bench.couple()
    values = load_file(file)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            parameter.copy_(values[name])
    about = _about(file)
    scorer = CausalScorer(model, trained_parameters=about["parameters"])
    return replace(Fitted(scorer=scorer, model=model), **about)


def _place(bench: Bench) -> Path:
    return bench.folder / "fitted" / f"{bench.key}.safetensors"


def _about(file: Any) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        return dict(json.loads(handle.metadata()["about"]))
