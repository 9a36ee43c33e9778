"""Specialists come and go without a bit of the others changing."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from . import backbone, checkpoint, planning
from .assembly import (
    Loader,
    Member,
    Reference,
    alignment_of,
    check_edges,
    check_forms,
    check_mix,
    custom_topology,
    specialist_layers,
)
from .bridges.router import check_widths
from .config import CouplingConfig, check_name
from .errors import ConfigError, InputError, nearest
from .topology import ANCHOR, Topology

if TYPE_CHECKING:
    from .modeling import CoupledForCausalLM


@dataclass(frozen=True, kw_only=True)
class Addition:
    """A specialist that is to come; the fields are the arguments of `CoupledForCausalLM.add_specialist`."""

    name: str
    reference: Reference
    bridges: str | Path | None = None
    edges: Any = None
    alignment: str = "auto"
    tokenizer: Any = None
    device_map: Any = None
    dtype: Any = None


def add(ensemble: CoupledForCausalLM, new: Addition) -> None:
    """Adds a specialist; see `CoupledForCausalLM.add_specialist`.

    Everything is made beside the ensemble, which changes only at the end: a refused specialist leaves it as it was.
    """
    _check(ensemble, new)
    value = ensemble.mixer.new_value()
    topology = custom_topology(ensemble.config, new.name, new.edges)
    member = _load(ensemble, new)
    staged = _staged(ensemble, member, _described(ensemble, member, new.alignment, topology))
    edges = [edge for edge in staged.edges if edge not in ensemble.edges]
    for edge in edges:
        staged._build_bridges(edge)
    if new.bridges is not None:
        checkpoint.load_edges(staged, new.bridges, edges)
    rows = [router.new_row() for router in ensemble.routers]
    staged.config.history |= {edge.key: staged.names for edge in edges}
    staged._tap(new.name)
    # From here on nothing is made and nothing can fail.
    vars(ensemble.config).update(vars(staged.config))
    ensemble.members[new.name] = member
    setattr(ensemble, f"lm_{new.name}", member.model)
    ensemble._handles |= staged._handles
    ensemble.bridges.update(staged.bridges)
    ensemble.mixer.add(new.name, value)
    for router, row in zip(ensemble.routers, rows, strict=True):
        router.add(new.name, row)


def _check_here(ensemble: CoupledForCausalLM) -> None:
    if ensemble.remote_names:
        raise ConfigError(
            "the models of an ensemble of several processes stay as they are: change the ensemble in one process, "
            "save it, and start the processes with that"
        )


def _check(ensemble: CoupledForCausalLM, new: Addition) -> None:
    """Refuses what needs no model to be refused."""
    _check_here(ensemble)
    check_name(new.name)
    if new.name.casefold() in [known.casefold() for known in ensemble.names]:
        raise ConfigError(f"the name {new.name!r} is taken; models: {', '.join(ensemble.names)}")
    if ensemble.config.bridge_config.kind == "moe":
        for field in ("edges", "bridges"):
            if getattr(new, field) is not None:
                raise ConfigError(
                    f"kind='moe' is a router over all models, without edges or bridges; leave {field} out"
                )


def _load(ensemble: CoupledForCausalLM, new: Addition) -> Member:
    """Loads the model as one of the ensemble's, which it may share its base with."""
    place = planning.resolved(
        None if new.device_map is None else {new.name: new.device_map},
        ensemble.models[ANCHOR],
        {name: ensemble.models[name] for name in ensemble.specialists} | {new.name: new.reference},
        topology=[],
        bridge=ensemble.config.bridge,
        dtype=new.dtype or ensemble.dtype,
    )
    device_map = None if place is None else {new.name: place[new.name]}
    dtype: Any = None if new.dtype is None else {new.name: new.dtype}
    if new.dtype is None and not isinstance(new.reference, PreTrainedModel):
        dtype = ensemble.dtype
    tokenizers = {} if new.tokenizer is None else {new.name: new.tokenizer}
    names = [*ensemble.names, new.name]
    loader = Loader(names, device_map, dtype, tokenizers, members=dict(ensemble.members))
    return loader.add(new.name, new.reference)


def _described(
    ensemble: CoupledForCausalLM, member: Member, asked: str, topology: Any
) -> CouplingConfig:
    """Checks the model against the ensemble and returns the config of both; its new edges have no history yet."""
    config, name = copy.copy(ensemble.config), member.name
    how = alignment_of(ensemble.members[ANCHOR], member, asked)
    depth = backbone.num_blocks(member.model)
    layers = specialist_layers(config, name, depth, may_stand=member.encodes)
    config.names = [*ensemble.names, name]
    config.models = {**(config.models or {}), name: member.ref.to_dict()}
    config.model_configs = {**(config.model_configs or {}), name: member.model.config}
    config.alignment = {**(config.alignment or {}), name: how}
    config.history = dict(config.history or {})
    config.site_layers = [
        [*row, layer] for row, layer in zip(config.site_layers or [], layers, strict=True)
    ]
    if not isinstance(topology, str):
        config.set_edges(Topology(topology).edges)
    check_edges(config.edges, config.alignment)
    check_forms(
        config.bridge_config, {}, [edge for edge in config.edges if name in edge], config.alignment
    )
    kind = config.bridge_config.kind
    check_mix(ensemble.mixer.kind, kind, config.alignment)
    if kind == "moe":
        models = {**ensemble.models, name: member.model}
        check_widths({n: backbone.stream_width(model) for n, model in models.items()})
    return config


def _staged(
    ensemble: CoupledForCausalLM, member: Member, config: CouplingConfig
) -> CoupledForCausalLM:
    """Returns the ensemble as it will be, without any bridges; it shares the models, and nothing made on it is seen."""
    staged = copy.copy(ensemble)
    staged._modules = dict(ensemble._modules)
    staged._handles = {}
    staged.config = config
    staged.members = {**ensemble.members, member.name: member}
    staged.bridges = nn.ModuleDict()
    setattr(staged, f"lm_{member.name}", member.model)
    return staged


def remove(ensemble: CoupledForCausalLM, name: str) -> None:
    """Removes a specialist; see `CoupledForCausalLM.remove_specialist`.

    Warns when bridges that stay were made while it was present.
    """
    _check_here(ensemble)
    if name == ANCHOR:
        raise InputError("the anchor cannot be removed; couple anew around another one")
    if name not in ensemble.names:
        raise InputError(f"unknown specialist {name!r}; {nearest(str(name), ensemble.specialists)}")
    config, column = ensemble.config, ensemble.names.index(name)
    gone = [edge for edge in ensemble.edges if name in edge]
    stay = [edge for edge in ensemble.edges if name not in edge]
    together = [edge for edge in stay if name in (config.history or {}).get(edge.key, [])]
    if together and name != ensemble.names[-1]:
        shown = ", ".join(f"{edge.source}->{edge.target}" for edge in together)
        warnings.warn(
            f"{name!r} is removed out of order: the bridges {shown} were made with it present and may want training",
            stacklevel=3,
        )
    for edge in gone:
        del ensemble.bridges[edge.key]
    for handle in ensemble._handles.pop(name):
        handle.remove()
    del ensemble.members[name]
    delattr(ensemble, f"lm_{name}")
    ensemble.__dict__.get("_tables", {}).pop(name, None)
    config.names = ensemble.names
    if not isinstance(config.topology, str):
        config.set_edges(stay)
    config.site_layers = [[*row[:column], *row[column + 1 :]] for row in config.site_layers or []]
    for field in ("models", "model_configs", "alignment", "fingerprints", "dtypes"):
        setattr(
            config,
            field,
            {key: value for key, value in (getattr(config, field) or {}).items() if key != name},
        )
    keys = {edge.key for edge in gone}
    for field in ("history", "edge_bridges"):
        kept = {k: v for k, v in (getattr(config, field) or {}).items() if k not in keys}
        setattr(config, field, kept)
    ensemble.mixer.remove(name)
    config.mix = ensemble.mixer.kind
    for router in ensemble.routers:
        router.remove(name)
