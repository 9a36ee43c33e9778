"""Writes a checkpoint: everything into a folder beside, then moved in; the rename of config.json is what counts."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from .. import backbone
from ..errors import CheckpointError, ConfigError, InputError
from ..topology import ANCHOR
from .card import model_card
from .files import move, write
from .identity import fingerprint, state_of
from .tokenizers import NAMES, drop_others, folders_in, write_tokenizers

if TYPE_CHECKING:
    from ..assembly import Member
    from ..modeling import CoupledForCausalLM

CONFIG = "config.json"
PREFIX = "bridges-"
STAGING = ".saving-"
BASES = "bases"
COPIES = "copies"
BASE = re.compile(r".+-[0-9a-f]{16}")
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
    committed = False
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _staging(target) as staging:
            _write(ensemble, staging, target, include_bases)
            config = _commit(staging, target)
            committed = True
            _tidy(staging, target, config)
    except OSError as error:
        if committed:
            raise CheckpointError(
                f"the checkpoint in {target} is saved, but not the copies of tokenizer and README for other tools: "
                f"{error.strerror or error}; save again"
            ) from error
        raise CheckpointError(
            f"cannot save to {target}: {error.strerror or error}; an earlier checkpoint there is unchanged"
        ) from error


def _check_members(ensemble: CoupledForCausalLM, include_bases: bool) -> None:
    if any(tensor.is_meta for tensor in ensemble.state_dict().values()):
        raise CheckpointError(
            f"the bridges into {', '.join(ensemble.remote_names)} are in their own processes; "
            "to save them, connect with trains=True"
        )
    if include_bases and ensemble.remote_names:
        raise CheckpointError(
            f"include_bases cannot save {ensemble.remote_names[0]!r}, whose weights another process holds"
        )
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


def _write(ensemble: CoupledForCausalLM, staging: Path, target: Path, include_bases: bool) -> None:
    config = _describe(ensemble)
    if include_bases:
        config["models"] = _write_bases(ensemble, staging, config["fingerprints"])
    else:
        config["models"] = {
            name: _from_inside(ref, target) for name, ref in config["models"].items()
        }
    config["bases_included"] = all(
        ref["base"].startswith(f"{BASES}/") for ref in config["models"].values()
    )
    data = save(state_of(ensemble), metadata={"format": "pt"})
    digest = hashlib.sha256(data).hexdigest()
    config["bridges_file"] = f"{PREFIX}{digest[:16]}.safetensors"
    config["bridges_sha256"] = digest
    config["generation"] = json.loads(ensemble.generation_config.to_json_string())
    config |= write_tokenizers(ensemble.tokenizers, staging)
    copies = staging / COPIES
    copies.mkdir()
    if (folder := config[NAMES][ANCHOR]) is not None:
        shutil.copytree(staging / folder, copies, dirs_exist_ok=True)
    write(staging / config["bridges_file"], data)
    write(copies / "generation_config.json", _json(config["generation"]))
    write(copies / "README.md", model_card(ensemble, config).encode())
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
    return config.to_dict()


def _from_inside(ref: dict[str, Any], target: Path) -> dict[str, Any]:
    """Names a base that lies in the checkpoint already by its place there, so that both can move."""
    place = Path(ref["base"])
    inside = place.is_dir() and place.resolve().parent == (target / BASES).resolve()
    return {**ref, "base": f"{BASES}/{place.name}"} if inside else ref


def _write_bases(
    ensemble: CoupledForCausalLM, staging: Path, fingerprints: dict[str, str]
) -> dict[str, Any]:
    """Saves every base under a name that its weights give it; returns the references."""
    models = {}
    for name, member in ensemble.members.items():
        fingerprints[name] = fingerprint(member, weights=True)
        place = f"{BASES}/{name}-{fingerprints[name].removeprefix('weights:')[:16]}"
        with ensemble.untapped(name):
            member.model.save_pretrained(str(staging / place))
        if member.encodes:
            _keep_processor(member, name, staging / place)
        models[name] = {"base": place}
    return models


def _keep_processor(member: Member, name: str, place: Path) -> None:
    """Saves what makes an encoder's inputs beside it, where it lay beside it before."""
    try:
        sound = member.model.main_input_name == "input_values"
        backbone.load_processor(member.ref, name, sound=sound).save_pretrained(str(place))
    except InputError as error:
        base = member.ref.base
        bare = base is None or (
            Path(base).is_dir() and not (Path(base) / "preprocessor_config.json").exists()
        )
        if not bare:  # it is there, and cannot be read
            warnings.warn(f"saved without what shows it something: {error}", stacklevel=2)


def _commit(staging: Path, target: Path) -> dict[str, Any]:
    """Moves into place what config.json names, then config.json itself; returns it."""
    config: dict[str, Any] = json.loads((staging / CONFIG).read_text(encoding="utf-8"))
    for base in (staging / BASES).glob("*"):
        place = target / BASES / base.name
        if not place.exists():  # its name says what it holds
            place.parent.mkdir(exist_ok=True)
            base.replace(place)
    for folder in folders_in(staging):
        move(folder, target / folder.name)
    (staging / config["bridges_file"]).replace(target / config["bridges_file"])
    (staging / CONFIG).replace(target / CONFIG)
    return config


def _tidy(staging: Path, target: Path, config: dict[str, Any]) -> None:
    """Puts copies for other tools at the top, and removes what config.json names no more."""
    drop_others(target, staging / COPIES)
    move(staging / COPIES, target)
    named = {Path(ref["base"]).name for ref in config["models"].values()}
    named |= {config["bridges_file"], *config[NAMES].values()}
    for file in target.glob(f"{PREFIX}*.safetensors"):
        if file.name not in named:
            file.unlink(missing_ok=True)
    bases = [place for place in (target / BASES).glob("*") if BASE.fullmatch(place.name)]
    for place in (*folders_in(target), *bases):
        if place.name not in named:
            shutil.rmtree(place, ignore_errors=True)


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
