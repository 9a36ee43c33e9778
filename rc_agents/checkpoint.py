"""Bridges on disk: safetensors, a config that names the bases and their fingerprints, a model card.

`config.json` is the one commit point of a save: it names the bridges' file by its hash and is replaced atomically, so
that a kill at any moment leaves the old checkpoint or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import cached_file

from . import backbone
from .assembly import Loader, Member
from .config import CouplingConfig, ModelRef
from .errors import CheckpointError, ConfigError, ModelError, nearest
from .topology import Edge

if TYPE_CHECKING:
    from .modeling import CoupledForCausalLM

CONFIG = "config.json"
PREFIX = "bridges-"


def state_of(ensemble: CoupledForCausalLM) -> dict[str, Tensor]:
    """Returns every tensor that is the ensemble's own: bridges, routers, mixer."""
    tensors = {name: tensor for name, tensor in ensemble.state_dict().items() if not name.startswith("lm_")}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it is either there whole or as it was."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_checkpoint(ensemble: CoupledForCausalLM, folder: str | Path, *, include_bases: bool = False) -> None:
    """Writes a checkpoint; see `CoupledForCausalLM.save_pretrained`.

    Raises:
        CheckpointError: a live model without a path, or a folder that cannot be written (read-only, full).
    """
    target = Path(folder)
    config = _config_to_save(ensemble, include_bases)
    try:
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target} is a file; save_pretrained needs a folder")
        target.mkdir(parents=True, exist_ok=True)
        if include_bases:
            _save_bases(ensemble, target)
        data = save(state_of(ensemble), metadata={"format": "pt", "rc_agents": "bridges"})
        digest = hashlib.sha256(data).hexdigest()
        name = f"{PREFIX}{digest[:16]}.safetensors"
        save_atomically(target / name, data)
        if ensemble.tokenizer is not None:
            ensemble.tokenizer.save_pretrained(str(target))
        save_atomically(target / "generation_config.json", ensemble.generation_config.to_json_string().encode())
        save_atomically(target / "README.md", model_card(ensemble, config).encode())
        config["bridges_file"], config["bridges_sha256"] = name, digest
        config["generation"] = json.loads(ensemble.generation_config.to_json_string())
        save_atomically(target / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise CheckpointError(
            f"cannot save to {target}: {error.strerror or error}; an earlier checkpoint there is unchanged"
        ) from error
    for old in target.glob(f"{PREFIX}*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def _config_to_save(ensemble: CoupledForCausalLM, include_bases: bool) -> dict[str, Any]:
    config = ensemble.config
    prints = {}
    for name, member in ensemble.members.items():
        if member.ref.base is None and not include_bases:
            raise CheckpointError(
                f"model {name!r} was passed in loaded and has no path or id; pass include_bases=True to save it too, "
                "or couple from a path"
            )
        known = (config.fingerprints or {}).get(name)
        prints[name] = known or fingerprint(member, include_bases)
    config.fingerprints = dict(prints)
    data = config.to_dict()
    data["fingerprints"] = prints
    data["bases_included"] = include_bases
    if include_bases:
        data["models"] = {name: {"base": f"bases/{name}"} for name in ensemble.names}
        data["fingerprints"] = {name: "weights:" + ensemble.base_fingerprint(name) for name in ensemble.names}
    data["architectures"] = [type(ensemble).__name__]
    return data


def fingerprint(member: Member, weights: bool = False) -> str:
    """Returns a member's fingerprint: of its files, or of its weights where it was passed in loaded."""
    if member.live or weights:
        return "weights:" + backbone.weights_hash(member.model)
    return backbone.fingerprint(member.ref, member.model)


def _save_bases(ensemble: CoupledForCausalLM, target: Path) -> None:
    for name, member in ensemble.members.items():
        if member.ref.adapter is not None:
            raise CheckpointError(f"include_bases cannot save {name!r}, a base with an adapter; save it merged first")
        hooks = ensemble._handles.pop(name)
        for handle in hooks:
            handle.remove()
        try:
            member.model.save_pretrained(str(target / "bases" / name))
            if member.tokenizer is not None:
                member.tokenizer.save_pretrained(str(target / "bases" / name))
        finally:
            ensemble._tap(name)


def model_card(ensemble: CoupledForCausalLM, config: Mapping[str, Any]) -> str:
    """Returns the README of a checkpoint, with the front matter that the hub reads."""
    refs = {name: str(ModelRef(**config["models"][name])) for name in ensemble.names}
    bases = sorted({config["models"][name]["base"] for name in ensemble.names})
    lines = ["---", "library_name: rc_agents", "tags: [residual-coupling]", "base_model:"]
    lines += [f"- {json.dumps(base)}" for base in bases]
    lines += ["---", "", "# Coupled frozen language models", ""]
    lines += ["| model | from | tokens meet the anchor's |", "|---|---|---|"]
    lines += [f"| {name} | {ref} | {(config['alignment'] or {}).get(name, '-')} |" for name, ref in refs.items()]
    edges = ", ".join(f"{edge.source} -> {edge.target}" for edge in ensemble.edges) or "none"
    trained = sum(tensor.numel() for tensor in state_of(ensemble).values())
    lines += ["", f"Edges: {edges}. Sites (anchor blocks): {[row[0] for row in ensemble.sites]}."]
    lines += [f"Bridges: {json.dumps(config['bridge'])}, {trained:,} values. Base weights are not included."]
    lines += ["", "```python", "import rc_agents", 'model = rc_agents.CoupledForCausalLM.from_pretrained("...")', "```"]
    return "\n".join(lines) + "\n"


def read(path: str | Path, **kwargs: Any) -> tuple[CouplingConfig, dict[str, Tensor], Path, dict[str, Any]]:
    """Returns a checkpoint's config, its tensors, its folder and the raw config.

    Raises:
        CheckpointError: no checkpoint there, or a truncated or foreign file.
    """
    revision = kwargs.get("revision")
    config_file = _file(path, CONFIG, revision)
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{config_file} is no JSON; the checkpoint is damaged, save or download it again") from None
    if not isinstance(raw, dict) or raw.get("model_type") != CouplingConfig.model_type:
        kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise CheckpointError(f"{path} holds a model of type {kind!r}, expected {CouplingConfig.model_type!r}")
    if "bridges_file" not in raw:
        raise CheckpointError(f"{config_file} names no bridges_file; it was not written by save_pretrained")
    file = _file(path, raw["bridges_file"], revision)
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != raw["bridges_sha256"]:
        raise CheckpointError(f"{file} is truncated or altered: its SHA-256 is not the one in {CONFIG}; copy it again")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no safetensors file: {backbone.first_line(error)}") from error
    own = {key: value for key, value in raw.items() if key not in ("bridges_file", "bridges_sha256", "generation")}
    return CouplingConfig.from_dict(own), tensors, config_file.parent, raw


def _file(path: str | Path, name: str, revision: str | None) -> Path:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; expected a folder written by save_pretrained")
        return folder / name
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; expected a folder written by save_pretrained")
    try:
        found = cached_file(str(path), name, revision=revision)
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint at {str(path)!r}: no such folder, and no such hub repository within reach "
            f"({backbone.first_line(error)})"
        ) from error
    return Path(str(found))


def load(
    cls: type[CoupledForCausalLM],
    path: str | Path,
    *,
    config: CouplingConfig | None = None,
    device_map: Any = None,
    dtype: Any = None,
    schedule: str | None = None,
    bases: Mapping[str, str] | None = None,
    check_fingerprints: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **kwargs: Any,
) -> CoupledForCausalLM:
    """Loads an ensemble; see `CoupledForCausalLM.from_pretrained`."""
    ignored = {"attn_implementation", "torch_dtype", "_from_auto", "code_revision", "_commit_hash", "token", "cache_dir"}
    unknown = set(kwargs) - ignored
    if unknown:
        raise ConfigError(f"from_pretrained got unknown arguments: {', '.join(sorted(unknown))}")
    config, tensors, folder, raw = read(path, revision=revision)
    if schedule is not None:
        config.schedule = schedule
    names = config.names or []
    for name in bases or {}:
        if name not in names:
            raise ConfigError(f"bases names an unknown model {name!r}; {nearest(name, names)}")
    if dtype is None:
        dtype = kwargs.get("torch_dtype") or config.dtype
    loader = Loader(names, device_map, dtype, {}, trust_remote_code)
    for name in names:
        ref = _resolved(ModelRef(**(config.models or {})[name]), folder, (bases or {}).get(name))
        try:
            member = loader.add(name, ref)
        except ModelError as error:
            raise CheckpointError(f"{path}: base of {name!r} is missing or unusable: {error}") from error
        if check_fingerprints:
            _check_fingerprint(path, config, member)
    for name, member in loader.members.items():
        member.ref = ModelRef(**(config.models or {})[name]) if name not in (bases or {}) else member.ref
    config.model_configs = {name: member.model.config for name, member in loader.members.items()}
    ensemble = cls(config, loader.members)
    put(ensemble, tensors, str(path))
    if raw.get("generation"):
        ensemble.generation_config = GenerationConfig.from_dict(raw["generation"])
    ensemble.name_or_path = str(path)
    return ensemble


def _resolved(ref: ModelRef, folder: Path, moved: str | None) -> ModelRef:
    """A base inside the checkpoint is found there; one that moved, where the user says."""
    base = moved or str(ref.base)
    if base.startswith("bases/"):
        base = str(folder / base)
    adapter = ref.adapter
    if adapter is not None and not Path(adapter).is_absolute() and (folder / adapter).is_dir():
        adapter = str(folder / adapter)
    return ModelRef(**{**ref.to_dict(), "base": base, **({"adapter": adapter} if adapter else {})})


def _check_fingerprint(path: Any, config: CouplingConfig, member: Member) -> None:
    wanted = (config.fingerprints or {}).get(member.name)
    if wanted is None:
        return
    found = fingerprint(member, weights=wanted.startswith("weights:"))
    if found != wanted:
        raise CheckpointError(
            f"{path}: the bridges were made for another {member.name!r}: its fingerprint was {wanted[:24]}..., the one at "
            f"{member.ref.base!r} has {found[:24]}...; load the original base or pass check_fingerprints=False"
        )


def put(ensemble: CoupledForCausalLM, tensors: Mapping[str, Tensor], where: str, only: Sequence[str] | None = None) -> None:
    """Copies tensors into the ensemble's own state after checking every name and shape; all or nothing."""
    own = {name: t for name, t in ensemble.state_dict(keep_vars=True).items() if not name.startswith("lm_")}
    if only is not None:
        own = {name: t for name, t in own.items() if name.startswith(tuple(only))}
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"{where}: the bridges do not fit this ensemble: {len(missing)} missing ({', '.join(missing[:2])}), "
            f"{len(extra)} unexpected ({', '.join(extra[:2])})"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, this ensemble needs {tuple(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinite values")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def load_edges(ensemble: CoupledForCausalLM, path: str | Path, name: str, edges: Sequence[Edge]) -> None:
    """Fills a new specialist's bridges from a saved ensemble that holds them.

    Raises:
        CheckpointError: the checkpoint lacks an edge, or its sites or bridge form differ.
    """
    config, tensors, _, _ = read(path)
    if config.bridge != ensemble.config.bridge:
        raise CheckpointError(f"{path}: its bridges have the form {config.bridge}, this ensemble's {ensemble.config.bridge}")
    saved_sites = [row[0] for row in config.site_layers or []]
    sites = [row[0] for row in ensemble.sites]
    if saved_sites != sites:
        raise CheckpointError(f"{path}: its bridges are for sites {saved_sites}, this ensemble meets at {sites}")
    wanted = [f"bridges.{edge.key}." for edge in edges]
    known = {key.split(".")[1] for key in tensors if key.startswith("bridges.")}
    for edge in edges:
        if edge.key not in known:
            raise CheckpointError(
                f"{path} has no bridges {edge.source!r} -> {edge.target!r}; it holds {', '.join(sorted(known)) or 'none'}"
            )
    picked = {key: value for key, value in tensors.items() if key.startswith(tuple(wanted))}
    put(ensemble, picked, str(path), only=wanted)
