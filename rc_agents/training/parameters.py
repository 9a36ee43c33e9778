"""Which parameters of an ensemble train, and at what rate."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from rc_agents.backbone import freeze
from rc_agents.errors import TrainingError, nearest
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.training.config import TrainConfig


@contextmanager
def training(
    model: CoupledForCausalLM,
    only: str | Sequence[str] | None = None,
    *,
    train_bases: bool = False,
) -> Iterator[dict[str, nn.Parameter]]:
    """Yields what trains, by name; inside the block all else is frozen, and afterwards everything is as before.

    Args:
        model: the ensemble.
        only: specialists whose edges train, in and out, and their share of a learned mix; all edges where left out.
        train_bases: train the base models' weights too. They are frozen again at the end.

    Raises:
        TrainingError: an unknown name, or nothing to train.
    """
    before = {name: one.requires_grad for name, one in model.named_parameters()}
    chosen = dict(model.trainable_parameters())
    if only is not None:
        wanted = [only] if isinstance(only, str) else list(only)
        chosen = {name: one for name, one in chosen.items() if _belongs(model, name, wanted)}
    if not chosen:
        raise TrainingError(
            "the ensemble has nothing to train: no edges, or every map and gate is fixed"
        )
    if train_bases:
        chosen |= _bases(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    try:
        yield chosen
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
        model.eval()


def _belongs(model: CoupledForCausalLM, name: str, wanted: Sequence[str]) -> bool:
    """Whether a parameter is of an edge from or to one of the specialists, or its share of the mix."""
    for one in wanted:
        if one not in model.specialists:
            raise TrainingError(f"only={one!r}: {nearest(one, model.specialists)}")
    if name.startswith("mixer."):
        return name.rsplit(".", 1)[-1] in wanted
    keys = {edge.key for edge in model.edges if set(edge) & set(wanted)}
    return name.startswith("bridges.") and name.split(".")[1] in keys


def _bases(model: CoupledForCausalLM) -> dict[str, nn.Parameter]:
    adapted = [name for name, member in model.members.items() if member.ref.adapter is not None]
    if adapted:
        raise TrainingError(
            f"train_bases cannot train {adapted[0]!r}, a base with an adapter; merge the adapter and couple that"
        )
    warnings.warn(
        "train_bases=True trains the base models: the ensemble no longer is its frozen models with bridges, and what "
        "they knew may be lost",
        stacklevel=6,
    )
    return {
        name: one
        for name, one in model.named_parameters()
        if name.startswith("lm_") and one.is_floating_point()
    }


def forget_sources(model: CoupledForCausalLM) -> None:
    """Makes every base one of its own, without the path and the fingerprint that its weights no longer have."""
    for member in model.members.values():
        member.ref, member.live = type(member.ref)(), True
        freeze(member.model)
    model.config.fingerprints = None


def groups(parameters: dict[str, nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """Returns an optimizer's groups, each of one rate, without empty ones: maps, pools, gates, mix, bases."""
    by_kind: dict[str, list[nn.Parameter]] = {
        "maps": [],
        "pools": [],
        "gates": [],
        "mix": [],
        "bases": [],
    }
    for name, parameter in parameters.items():
        by_kind[_kind(name)].append(parameter)
    mix_rate, pool_rate = config.mix_learning_rate, config.pool_learning_rate
    rates = {
        "maps": config.learning_rate,
        "pools": config.learning_rate if pool_rate is None else pool_rate,
        "gates": config.gate_learning_rate,
        "mix": config.gate_learning_rate if mix_rate is None else mix_rate,
        "bases": config.base_learning_rate,
    }
    return [
        {
            "params": members,
            "lr": rates[kind],
            "weight_decay": config.weight_decay if kind == "maps" else 0.0,
            "kind": kind,
        }
        for kind, members in by_kind.items()
        if members
    ]


def _kind(name: str) -> str:
    if name.startswith("lm_"):
        return "bases"
    if name.startswith(("mixer.", "routers.")):
        return "mix"
    if ".pool." in name:
        return "pools"
    return "maps" if ".map." in name else "gates"
