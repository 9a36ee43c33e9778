"""Finds a checkpoint's files and reads them, each checked before anything is built from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from .. import backbone
from ..config import CouplingConfig
from ..errors import CheckpointError
from ..topology import ANCHOR
from .saving import CONFIG
from .tokenizers import HASHES, NAMES

NEEDED = (
    "names",
    "models",
    "site_layers",
    "bridge",
    "topology",
    "bridges_file",
    "bridges_sha256",
)


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Args:
        path: as the user wrote it.
        folder: where its files lie.
        config: the ensemble.
        tensors: its own tensors by name.
        generation: its generation settings.
        tokenizers: the folder of each model's tokenizer, None for a model without one; empty in checkpoints of before,
            whose tokenizers come from the bases.
        digest: SHA-256 of its tensors' file.
    """

    path: str
    folder: Path
    config: CouplingConfig
    tensors: dict[str, Tensor]
    generation: GenerationConfig
    tokenizers: dict[str, Path | None]
    digest: str = ""


def read(path: str | Path, **hub: Any) -> Checkpoint:
    """Reads a checkpoint whole.

    Args:
        path: folder, hub id or `package:NAME`.
        hub: revision, token and the like, for `transformers.utils.cached_file`.

    Raises:
        CheckpointError: no checkpoint there, or a truncated or foreign file.
    """
    path = backbone.locate(str(path))
    config_file = _file(path, CONFIG, hub)
    raw = _config(config_file)
    weights, data = _whole(path, raw["bridges_file"], raw["bridges_sha256"], hub)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{weights} is no safetensors file: {backbone.first_line(error)}; save it again"
        ) from error
    for name, digest in raw.pop(HASHES, {}).items():
        _whole(path, name, digest, hub)
    folders = {
        name: None if folder is None else config_file.parent / folder
        for name, folder in raw.pop(NAMES, {}).items()
    }
    generation = GenerationConfig.from_dict(raw.pop("generation", {}))
    own = {key: value for key, value in raw.items() if not key.startswith("bridges_")}
    config = CouplingConfig.from_dict(own)
    digest = raw["bridges_sha256"]
    return Checkpoint(path, config_file.parent, config, tensors, generation, folders, digest)


SHARED = ("names", "site_layers", "topology", "bridge", "edge_bridges", "alignment", "mix")


def identity(path: str | Path, **hub: Any) -> str:
    """Returns a hash by which processes tell that they have the same ensemble: its form, bridges and bases.

    Where the bases lie does not count.
    """
    found = read(path, **hub)
    config = found.config.to_dict()
    told = {key: config.get(key) for key in (*SHARED, "fingerprints")}
    text = json.dumps([found.digest, told], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _config(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(
            f"{file} is no JSON; the checkpoint is damaged, save or download it again"
        ) from None
    kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
    if kind != CouplingConfig.model_type:
        raise CheckpointError(
            f"{file.parent} holds a model of type {kind!r}, expected {CouplingConfig.model_type!r}; "
            "couple it with rc_agents.couple(...)"
        )
    missing = [key for key in NEEDED if not raw.get(key) and raw.get(key) != []]
    if not missing:
        missing = [f"models of {name!r}" for name in raw["names"] if name not in raw["models"]]
    widths = {len(row) for row in raw.get("site_layers") or []}
    if missing or raw["names"][:1] != [ANCHOR] or widths != {len(raw["names"])}:
        shown = f" (no {', '.join(missing)})" if missing else ""
        raise CheckpointError(
            f"{file} is incomplete{shown}; it was not written by save_pretrained, save it again"
        )
    return raw


def _whole(path: str, name: str, digest: str, hub: dict[str, Any]) -> tuple[Path, bytes]:
    """Reads a file whose SHA-256 config.json holds."""
    file = _file(path, name, hub)
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"{file} is truncated or altered: its SHA-256 is not the one in {CONFIG}; copy it again"
        )
    return file, data


def _file(path: str, name: str, hub: dict[str, Any]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}; expected a folder written by save_pretrained"
            )
        return folder / name
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; expected a folder written by save_pretrained")
    try:
        found = cached_file(path, name, **hub)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no checkpoint at {path!r}: no such folder, and no such hub repository within reach "
            f"({backbone.first_line(error)})"
        ) from error
    return Path(str(found))
