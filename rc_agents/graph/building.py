"""Builds a graph from what a user passes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..assembly import Loader, Member
from ..backbone import share_weights
from ..config import ModelRef, check_choice
from ..errors import ConfigError, nearest
from ..nodes.settings import NodeSettings, address_of
from ..placement import device_map_of, dtype_of, execution_device
from .config import GraphConfig
from .model import LatentGraph
from .remote import RemoteNode


def build(
    config: GraphConfig | Mapping[str, Any] | str | Path,
    models: Mapping[str, PreTrainedModel] | None = None,
    *,
    tokenizers: Mapping[str, Any] | None = None,
    device_map: Any = None,
    dtype: Any = None,
    quantization: Any = None,
    schedule: str = "lockstep",
    seed: int = 0,
    trust_remote_code: bool = False,
    processes: Mapping[str, str] | None = None,
    settings: NodeSettings | None = None,
) -> LatentGraph:
    """Loads a graph's models and joins them by fresh edges and a fresh output.

    Args:
        config: a `GraphConfig`, the same as plain data, or a file of YAML.
        models: loaded models by node, in place of what the config names.
        tokenizers: by node, in place of the models' own.
        device_map: None, one value for all, or a dict by node of whatever Hugging Face accepts. An edge lives where the
            node that it leads into is, the output where the last node that it reads is.
        dtype: one for all, or a dict by node.
        quantization: as in `rc_agents.couple`, by node.
        schedule: "lockstep", or "threads": the nodes of one level run at once.
        seed: of the start of what trains.
        trust_remote_code: lets Hugging Face run code that comes with a model; off unless asked for.
        processes: by node, "host:port" of the process that runs it (`serving.NodeServer`); the nodes of a level that
            run elsewhere run at once under any schedule.
        settings: deadlines and the secret for those.

    Raises:
        ConfigError, ModelError, PackageError: one line that says what to do.
        LinkError: a process that cannot be reached.
    """
    config = GraphConfig.of(config)
    check_choice("schedule", schedule)
    names = list(config.nodes)
    given_by = {"models": models, "tokenizers": tokenizers, "processes": processes}
    for what, given in given_by.items():
        for name in given or {}:
            if name not in names:
                raise ConfigError(f"{what} names an unknown node {name!r}; {nearest(name, names)}")
    for what, given in {"models": models, "tokenizers": tokenizers}.items():
        both = sorted(set(given or {}) & set(processes or {}))
        if both:
            raise ConfigError(
                f"{what} names {both[0]!r}, which runs in another process; name it there or here"
            )
    loader = Loader(
        names, device_map, dtype, tokenizers or {}, trust_remote_code, quantization=quantization
    )
    remote: dict[str, RemoteNode] = {}
    for name, node in config.nodes.items():
        if processes and name in processes:
            place_of = address_of(processes[name], None)
            remote[name] = RemoteNode(name, node, place_of, settings or NodeSettings())
        elif models and name in models:
            loader.add(name, models[name])
        elif node.model.base is None:
            raise ConfigError(
                f"node {name!r} names no model, and none was passed in; write model: in the graph, or pass "
                f"models={{{name!r}: ...}}"
            )
        elif (twin := _twin(loader, name, node.model)) is not None:
            loader.members[name] = twin
        else:
            loader.add(name, node.model)
    return assemble(config, loader.members, remote, schedule=schedule, seed=seed)


def assemble(
    config: GraphConfig,
    members: Mapping[str, Member],
    remote: Mapping[str, RemoteNode],
    *,
    schedule: str,
    seed: int,
) -> LatentGraph:
    """Joins loaded models; what trains starts as `seed` says, and the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        graph = LatentGraph(config, members, schedule, remote)
    return place(graph)


def place(graph: LatentGraph) -> LatentGraph:
    """Puts every edge where the node is that it leads into, and the output where the last node is that it reads."""
    where = {
        name: node.device if isinstance(node, RemoteNode) else execution_device(node.model)
        for name, node in graph.nodes.items()
    }
    home = where[graph.config.voice or graph.config.read[-1]]
    for name, module in (*graph.encode.items(), *graph.pools.items()):
        module.to(where[name])
    for name, module in graph.hear.items():
        module.to(where[name])
    graph.readout.to(home)
    return graph


def _twin(loader: Loader, name: str, ref: ModelRef) -> Member | None:
    """The node's model over the weights of an equal one that is loaded already, in the same place and dtype."""
    for other in loader.members.values():
        same = other.ref == ref and not other.live
        for of, asked in ((device_map_of, loader.device_map), (dtype_of, loader.dtype)):
            same = same and of(name, asked, loader.names) == of(other.name, asked, loader.names)
        if same and not isinstance(loader.quantization, Mapping) and ref.quantization is None:
            return Member(name, ref, share_weights(other.model), other.tokenizer)
    return None
