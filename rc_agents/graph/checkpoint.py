"""A trained graph on disk: its edges and output as safetensors, and one file of JSON that says what it is.

`graph.json` is put in place last, by one rename, and names the weights by their hash: a save that is killed leaves what
was there. Bases are named, never copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..backbone import first_line, locate
from ..checkpoint.files import write
from ..checkpoint.identity import check_fingerprint, put, state_of
from ..errors import CheckpointError, ConfigError
from .building import build
from .config import GraphConfig
from .model import LatentGraph

GRAPH, PREFIX = "graph.json", "edges-"
KIND = "latent_graph"


def save(graph: LatentGraph, folder: str | Path) -> None:
    """Writes a graph into a folder.

    Raises:
        CheckpointError: a model that was passed in loaded has no path or id, or the folder cannot be written.
    """
    place = Path(folder)
    for name, member in graph.members.items():
        if member.ref.base is None:
            raise CheckpointError(
                f"node {name!r} was passed in loaded and has no path or id by which the graph could name it; build it "
                "from a path"
            )
    data = save_tensors(state_of(graph), metadata={"format": "pt"})
    digest = hashlib.sha256(data).hexdigest()
    described = {
        "kind": KIND,
        "graph": _described(graph),
        "blocks": {name: {"at": one.at, "layer": one.layer} for name, one in graph.nodes.items()},
        "edges_file": f"{PREFIX}{digest[:16]}.safetensors",
        "edges_sha256": digest,
        "temperature": graph.temperature,
        "routing": graph.routing,
        "fingerprints": graph.fingerprints(),
    }
    try:
        place.mkdir(parents=True, exist_ok=True)
        _replace(place / described["edges_file"], data)
        _replace(place / GRAPH, (json.dumps(described, indent=2) + "\n").encode())
        for old in place.glob(f"{PREFIX}*.safetensors"):
            if old.name != described["edges_file"]:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot save to {place}: {error.strerror or error}; an earlier graph there is unchanged"
        ) from error


def _described(graph: LatentGraph) -> dict[str, Any]:
    """The config, with the references that the models were loaded by."""
    data = graph.config.to_dict()
    for name, member in graph.members.items():
        data["nodes"][name]["model"] = member.ref.to_dict()
    for name, node in graph.remote.items():
        if not data["nodes"][name]["model"]:
            data["nodes"][name]["model"] = node.card["model"]
    return data


def _replace(path: Path, content: bytes) -> None:
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=".saving-")
    os.close(handle)
    try:
        write(Path(staged), content)
        os.chmod(staged, 0o644)
        os.replace(staged, path)
    finally:
        Path(staged).unlink(missing_ok=True)


def load(
    path: str | Path,
    models: Mapping[str, PreTrainedModel] | None = None,
    *,
    check_fingerprints: bool = True,
    revision: str | None = None,
    **options: Any,
) -> LatentGraph:
    """Loads a graph that was saved.

    Args:
        path: its folder, or a hub id.
        models: loaded models by node, in place of those that it names.
        check_fingerprints: whether a base may be another one than the graph was trained on.
        revision: of the hub id.
        options: as for `build`: `device_map`, `dtype`, `schedule`, ...

    Raises:
        CheckpointError: no graph there, a damaged file, or other bases.
    """
    described, tensors = _read(str(path), revision)
    config = GraphConfig.of(described["graph"])
    graph = build(config, models, **options)
    if check_fingerprints:
        for name, member in graph.members.items():
            check_fingerprint(path, described["fingerprints"].get(name), member)
        for name, node in graph.remote.items():
            if node.fingerprint != described["fingerprints"].get(name, node.fingerprint):
                raise CheckpointError(
                    f"{path}: the edges were made for another {name!r} than runs in its process; start that with the "
                    "original model, or pass check_fingerprints=False"
                )
    put(graph, tensors, str(path))
    graph.temperature = float(described["temperature"])
    graph.routing = dict(described["routing"])
    return graph


def outline(path: str | Path, revision: str | None = None) -> tuple[GraphConfig, dict[str, float]]:
    """Returns a saved graph's config, with its blocks by number and the strengths that it learned, and its routing.

    No model is loaded.

    Raises:
        CheckpointError: no graph there, or a damaged file; ConfigError: a graph that cannot be.
    """
    described, tensors = _read(str(path), revision)
    config = GraphConfig.of(described["graph"])
    learned = {name: tensors.get(f"hear.{name}.strength.value") for name in config.hearing}
    settled: dict[str, dict[str, Any]] = {
        name: dict(described.get("blocks", {}).get(name, {})) for name in config.nodes
    }
    for name, value in learned.items():
        settled[name] |= {} if value is None else {"strength": float(value)}
    nodes = {name: replace(node, **settled[name]) for name, node in config.nodes.items()}
    return replace(config, nodes=nodes), dict(described["routing"])


def config_of(graph: GraphConfig | Mapping[str, Any] | str | Path) -> GraphConfig:
    """Returns a graph's config: as it is, from data, from a file of YAML, or of a saved graph."""
    if isinstance(graph, (str, Path)):
        place = Path(graph).expanduser()
        if not place.is_file() and place.suffix not in (".yaml", ".yml", ".json"):
            return GraphConfig.of(_read(str(graph), None)[0]["graph"])
    return GraphConfig.of(graph)


def _read(path: str, revision: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    place = locate(path)
    try:
        described = json.loads(_file(place, GRAPH, revision).read_text(encoding="utf-8"))
        assert described["kind"] == KIND
        data = _file(place, described["edges_file"], revision).read_bytes()
        wanted = described["edges_sha256"]
        GraphConfig.of(described["graph"])
        float(described["temperature"])
        dict(described["fingerprints"]), dict(described["routing"])
        all(dict(one) for one in dict(described.get("blocks", {})).values())
    except OSError as error:
        raise CheckpointError(
            f"no graph at {path}: {first_line(error)}; expected {GRAPH} and its weights"
        ) from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(
            f"{path}/{GRAPH} is damaged ({first_line(error)}); save the graph again"
        ) from error
    if hashlib.sha256(data).hexdigest() != wanted:
        raise CheckpointError(
            f"{path}: the weights are truncated or altered; save or download the graph again"
        )
    try:
        return described, load_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no safetensors: {first_line(error)}; save it again"
        ) from error


def _file(place: str, name: str, revision: str | None) -> Path:
    if Path(place).is_dir():
        return Path(place) / name
    found = cached_file(place, name, revision=revision)
    return Path(str(found))
