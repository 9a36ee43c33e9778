"""Builds an ensemble from models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import planning
from ..alignment import Sites
from ..assembly import Loader, Reference, describe, member_names
from ..config import BridgeConfig
from ..errors import ConfigError
from ..topology import ANCHOR, Topology
from .coupled import CoupledForCausalLM


def couple(
    anchor: Reference,
    specialists: Mapping[str, Reference] | None = None,
    *,
    topology: str | Topology | Sequence[Sequence[str]] = "multi_bilateral",
    bridge: BridgeConfig | dict[str, Any] | str | None = None,
    edge_bridges: Mapping[tuple[str, str], BridgeConfig | dict[str, Any] | str] | None = None,
    sites: Sites = 5,
    alignment: str = "auto",
    mix: str = "anchor",
    device_map: Any = None,
    dtype: Any = None,
    quantization: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    schedule: str = "lockstep",
    tokenizers: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> CoupledForCausalLM:
    """Couples frozen models into one.

    Args:
        anchor: the generalist, whose tokens go in and come out: hub id, path, `package:NAME`, `ModelRef` or a loaded
            model.
        specialists: name -> model, in order of addition; None or empty for the anchor alone.
        topology: "unilateral", "star_bilateral", "multi_bilateral", or a `Topology` of edges.
        bridge: the form of the bridges, a `BridgeConfig`.
        edge_bridges: (source, target) -> another form for the bridges of this edge.
        sites: how many meeting points, the last block included; the anchor's 1-based blocks; or a mapping for each,
            such as {"anchor": 12, "medical": 28}, by which a model is read late and heard early.
        alignment: how tokens meet: "auto" (shared for equal tokenizers, else span), "shared", "span", or "clamp" (the
            published form, for comparison).
        mix: "anchor", "average", "learned" or "sigmoid".
        device_map: None, one value for all, or a dict by model name of whatever Hugging Face accepts; "auto" shares the
            devices fairly among the models (`rc_agents.plan` says how).
        dtype: one for all, or a dict by model name; None keeps what is stored.
        quantization: one for all, or a dict by model name, in place of what a `ModelRef` says: a configuration of
            transformers or "int8".
        max_memory: what "auto" may take, device -> memory, "cpu" and "disk" among them; None for nine tenths of what is
            free here.
        offload_folder: where weights go that a device map puts on "disk" and that cannot be read from where they lie.
        schedule: "lockstep" (one thread) or "threads" (one a model).
        tokenizers: name -> tokenizer in place of the base's; models that were passed in loaded bring none.
        trust_remote_code: lets Hugging Face run code that comes with a model; off unless asked for.

    Returns:
        The ensemble, in eval mode, every base frozen.

    Raises:
        ConfigError, ModelError, TokenError, PackageError: one line that says what to do.
    """
    names = member_names(specialists)
    for key in tokenizers or {}:
        if key not in names:
            raise ConfigError(
                f"tokenizers names an unknown model {key!r}; known: {', '.join(names)}"
            )
    device_map = planning.resolved(
        device_map,
        anchor,
        specialists or {},
        max_memory=max_memory,
        topology=topology,
        bridge=bridge,
        sites=sites,
        dtype=dtype,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
    )
    loader = Loader(
        names,
        device_map,
        dtype,
        tokenizers or {},
        trust_remote_code,
        quantization=quantization,
        offload_folder=offload_folder,
    )
    for name, reference in {ANCHOR: anchor, **(specialists or {})}.items():
        loader.add(name, reference)
    config = describe(
        loader.members,
        topology=topology,
        bridge=bridge,
        edge_bridges=edge_bridges or {},
        sites=sites,
        alignment=alignment,
        mix=mix,
        schedule=schedule,
    )
    return CoupledForCausalLM(config, loader.members)
