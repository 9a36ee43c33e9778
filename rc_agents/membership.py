"""Specialists come and go without a bit of the others changing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from . import backbone, checkpoint
from .assembly import Loader, Reference, alignment_of, check_mix, custom_topology, specialist_layers
from .bridges.router import check_widths
from .config import check_name
from .errors import ConfigError, InputError, nearest
from .topology import ANCHOR

if TYPE_CHECKING:
    from .modeling import CoupledForCausalLM


def add(
    ensemble: CoupledForCausalLM,
    name: str,
    reference: Reference,
    bridges: str | Path | None,
    edges: Any,
    alignment: str,
    tokenizer: Any,
    device_map: Any,
    dtype: Any,
) -> None:
    """Adds a specialist; see `CoupledForCausalLM.add_specialist`. A refused one leaves the ensemble as it was."""
    check_name(name)
    if name.casefold() in [known.casefold() for known in ensemble.names]:
        raise ConfigError(f"the name {name!r} is taken; models: {', '.join(ensemble.names)}")
    config, names = ensemble.config, [*ensemble.names, name]
    if ensemble.mixer.kind == "sigmoid":
        raise ConfigError("mix='sigmoid' is the published two-model form and takes no third model")
    topology = custom_topology(config, name, edges)
    tokenizers = {} if tokenizer is None else {name: tokenizer}
    maps = {} if device_map is None else {name: device_map}
    kinds = {} if dtype is None else {name: dtype}
    loader = Loader(names, maps or None, kinds or None, tokenizers, members=dict(ensemble.members))
    if not kinds and not isinstance(reference, PreTrainedModel):
        loader.dtype = ensemble.dtype
    member = loader.add(name, reference)
    how = alignment_of(ensemble.members[ANCHOR], member, alignment)
    check_mix(
        ensemble.mixer.kind, config.bridge_config.kind, {**(config.alignment or {}), name: how}
    )
    if config.bridge_config.kind == "moe":
        check_widths({n: backbone.stream_width(m.model) for n, m in loader.members.items()})
    layers = specialist_layers(config, name, backbone.num_blocks(member.model))
    before = set(ensemble.edges)
    saved = (config.names, config.topology, config.site_layers)
    config.names = names
    config.topology = topology
    config.site_layers = [
        [*row, layer] for row, layer in zip(config.site_layers or [], layers, strict=True)
    ]
    new = [edge for edge in ensemble.edges if edge not in before]
    ensemble.members[name] = member
    setattr(ensemble, f"lm_{name}", member.model)
    try:
        for edge in new:
            ensemble._build_bridges(edge)
        if bridges is not None:
            checkpoint.load_edges(ensemble, bridges, new)
    except Exception:
        del ensemble.members[name]
        delattr(ensemble, f"lm_{name}")
        for edge in new:
            if edge.key in ensemble.bridges:
                del ensemble.bridges[edge.key]
        config.names, config.topology, config.site_layers = saved
        raise
    ensemble._tap(name)
    config.models = {**(config.models or {}), name: member.ref.to_dict()}
    config.model_configs = {**(config.model_configs or {}), name: member.model.config}
    config.alignment = {**(config.alignment or {}), name: how}
    config.history = {**(config.history or {}), **{edge.key: names for edge in new}}
    ensemble.mixer.add(name)
    for router in ensemble.routers:
        router.add(name)


def remove(ensemble: CoupledForCausalLM, name: str) -> None:
    """Removes a specialist; see `CoupledForCausalLM.remove_specialist`.

    Warns when bridges that stay were made while it was present.
    """
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
    if not isinstance(config.topology, str):
        config.topology = [list(edge) for edge in stay]
    for edge in gone:
        del ensemble.bridges[edge.key]
    for handle in ensemble._handles.pop(name):
        handle.remove()
    del ensemble.members[name]
    delattr(ensemble, f"lm_{name}")
    ensemble.__dict__.get("_tables", {}).pop(name, None)
    config.names = ensemble.names
    config.site_layers = [[*row[:column], *row[column + 1 :]] for row in config.site_layers or []]
    for field in ("models", "model_configs", "alignment", "fingerprints", "dtypes"):
        setattr(
            config,
            field,
            {key: value for key, value in (getattr(config, field) or {}).items() if key != name},
        )
    keys = {edge.key for edge in gone}
    config.history = {
        key: value for key, value in (config.history or {}).items() if key not in keys
    }
    ensemble.mixer.remove(name)
    config.mix = ensemble.mixer.kind
    for router in ensemble.routers:
        del router.rows[name]
