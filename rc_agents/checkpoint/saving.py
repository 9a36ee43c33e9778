"""Writes a checkpoint: everything into a folder beside, then moved in, config.json last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from ..errors import CheckpointError, ConfigError
from .card import model_card
from .identity import fingerprint, state_of

if TYPE_CHECKING:
    from ..modeling import CoupledForCausalLM

CONFIG = "config.json"
PREFIX = "bridges-"
STAGING = ".saving-"
USUAL = {
    "is_main_process",
    "max_shard_size",
    "safe_serialization",
    "state_dict",
    "token",
    "variant",
}
"""What trainers and habits pass to every model's `save_pretrained`; of no use here."""


def save_checkpoint(
    ensemble: CoupledForCausalLM, folder: str | Path, *, include_bases: bool = False, **kwargs: Any
) -> None:
    """Writes a checkpoint; see `CoupledForCausalLM.save_pretrained`.

    Raises:
        CheckpointError: a live model without a path, or a folder that cannot be written (read-only, full).
    """
    if unknown := sorted(kwargs.keys() - USUAL):
        raise ConfigError(
            f"save_pretrained got an unknown argument {unknown[0]!r}; it takes include_bases, "
            "and push_to_hub(...) uploads"
        )
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; save_pretrained needs a folder")
    _check_members(ensemble, include_bases)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _staging(target) as staging:
            _write(ensemble, staging, include_bases)
            _commit(staging, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot save to {target}: {error.strerror or error}; an earlier checkpoint there is unchanged"
        ) from error


def _check_members(ensemble: CoupledForCausalLM, include_bases: bool) -> None:
    for name, member in ensemble.members.items():
        if member.ref.base is None and not include_bases:
            raise CheckpointError(
                f"model {name!r} was passed in loaded and has no path or id; pass include_bases=True to save it too, "
                "or couple from a path"
            )
        if member.ref.adapter is not None and include_bases:
            raise CheckpointError(
                f"include_bases cannot save {name!r}, a base with an adapter; merge the adapter and save that first"
            )


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder inside `target` that is gone afterwards, as are those that killed saves left."""
    for old in target.glob(f"{STAGING}*"):
        shutil.rmtree(old, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=target))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(ensemble: CoupledForCausalLM, staging: Path, include_bases: bool) -> None:
    config = _describe(ensemble)
    if include_bases:
        config["bases_included"] = True
        config["models"] = _write_bases(ensemble, staging, config["fingerprints"])
    data = save(state_of(ensemble), metadata={"format": "pt", "rc_agents": "bridges"})
    digest = hashlib.sha256(data).hexdigest()
    config["bridges_file"] = f"{PREFIX}{digest[:16]}.safetensors"
    config["bridges_sha256"] = digest
    config["generation"] = json.loads(ensemble.generation_config.to_json_string())
    if ensemble.tokenizer is not None:
        ensemble.tokenizer.save_pretrained(str(staging))
    write(staging / config["bridges_file"], data)
    write(staging / "generation_config.json", _json(config["generation"]))
    write(staging / "README.md", model_card(ensemble, config).encode())
    write(staging / CONFIG, _json(config))


def _describe(ensemble: CoupledForCausalLM) -> dict[str, Any]:
    """The config as it goes to disk; fingerprints and dtypes are those of the models in memory."""
    config = ensemble.config
    known = config.fingerprints or {}
    config.fingerprints = {
        name: known.get(name) or fingerprint(member, weights=member.ref.base is None)
        for name, member in ensemble.members.items()
    }
    config.dtypes = {
        name: str(model.dtype).removeprefix("torch.") for name, model in ensemble.models.items()
    }
    config.architectures = [type(ensemble).__name__]
    return config.to_dict() | {"bases_included": False}


def _write_bases(
    ensemble: CoupledForCausalLM, staging: Path, fingerprints: dict[str, str]
) -> dict[str, Any]:
    """Saves every base under a name that its weights give it; returns the references."""
    models = {}
    for name, member in ensemble.members.items():
        fingerprints[name] = fingerprint(member, weights=True)
        place = f"bases/{name}-{fingerprints[name].removeprefix('weights:')[:16]}"
        with ensemble.untapped(name):
            member.model.save_pretrained(str(staging / place))
        if member.tokenizer is not None:
            member.tokenizer.save_pretrained(str(staging / place))
        models[name] = {"base": place}
    return models


def _commit(staging: Path, target: Path) -> None:
    """Moves what was written into place, config.json last; then removes what nothing names any more."""
    config = json.loads((staging / CONFIG).read_text(encoding="utf-8"))
    bases = {Path(ref["base"]).name for ref in config["models"].values()}
    for base in (staging / "bases").glob("*"):
        place = target / "bases" / base.name
        if not place.exists():  # its name says what it holds
            place.parent.mkdir(exist_ok=True)
            base.replace(place)
    for file in staging.iterdir():
        if file.is_file() and file.name != CONFIG:
            file.replace(target / file.name)
    (staging / CONFIG).replace(target / CONFIG)
    for old in target.glob(f"{PREFIX}*.safetensors"):
        if old.name != config["bridges_file"]:
            old.unlink(missing_ok=True)
    for old in (target / "bases").glob("*"):
        if old.name not in bases:
            shutil.rmtree(old, ignore_errors=True)


def write(path: Path, data: bytes) -> None:
    """Writes a file through to the disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
