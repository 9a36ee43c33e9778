"""Builds an ensemble from a checkpoint and its bases: all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import backbone
from ..assembly import Loader
from ..config import ModelRef, check_choice
from ..errors import CheckpointError, ConfigError, ModelError, nearest
from .identity import check_fingerprint, put
from .reading import Checkpoint, read

if TYPE_CHECKING:
    from ..modeling import CoupledForCausalLM

HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")
FROM_AUTO = {"_from_auto", "adapter_kwargs", "config"}


def load(
    cls: type[CoupledForCausalLM],
    path: str | Path,
    *,
    device_map: Any = None,
    dtype: Any = None,
    schedule: str | None = None,
    bases: Mapping[str, str | Path] | None = None,
    check_fingerprints: bool = True,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> CoupledForCausalLM:
    """Loads an ensemble; see `CoupledForCausalLM.from_pretrained`."""
    hub = {key: kwargs.pop(key) for key in HUB if key in kwargs}
    dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
    if unknown := sorted(kwargs.keys() - FROM_AUTO):
        known = ("device_map", "dtype", "schedule", "bases", "check_fingerprints", *HUB)
        raise ConfigError(
            f"from_pretrained got an unknown argument {unknown[0]!r}; {nearest(unknown[0], known)}"
        )
    found = read(path, **hub)
    config, names = found.config, found.config.names or []
    if schedule is not None:
        check_choice("schedule", schedule)
        config.schedule = schedule
    for name in bases or {}:
        if name not in names:
            raise ConfigError(f"bases names an unknown model {name!r}; {nearest(name, names)}")
    loader = Loader(names, device_map, dtype or config.dtypes, {}, trust_remote_code)
    for name in names:
        _load_base(loader, found, name, (bases or {}).get(name), check_fingerprints)
    _check_depths(found, loader)
    config.model_configs = {name: member.model.config for name, member in loader.members.items()}
    ensemble = cls(config, loader.members)
    put(ensemble, found.tensors, found.path)
    ensemble.generation_config = found.generation
    ensemble.name_or_path = found.path
    return ensemble


def _load_base(
    loader: Loader, found: Checkpoint, name: str, moved: str | Path | None, check: bool
) -> None:
    saved = ModelRef(**(found.config.models or {})[name])
    try:
        member = loader.add(name, _resolved(saved, found.folder, moved))
    except ModelError as error:
        raise CheckpointError(
            f"{found.path}: the base of {name!r} is missing or unusable, name its place with "
            f"bases={{{name!r}: ...}}: {error}"
        ) from error
    if check:
        check_fingerprint(found.path, (found.config.fingerprints or {}).get(name), member)
    if moved is None:
        member.ref = saved
    else:
        found.config.models = {**(found.config.models or {}), name: member.ref.to_dict()}


def _resolved(ref: ModelRef, folder: Path, moved: str | Path | None) -> ModelRef:
    """A base inside the checkpoint is found there; one that moved, where the user says."""
    parts = {"base": str(moved or ref.base), "adapter": ref.adapter}
    for key, part in parts.items():
        if part is not None and not Path(part).is_absolute() and (folder / part).is_dir():
            parts[key] = str(folder / part)
    return ModelRef(**{**ref.to_dict(), **parts})


def _check_depths(found: Checkpoint, loader: Loader) -> None:
    for column, (name, member) in enumerate(loader.members.items()):
        depth = backbone.num_blocks(member.model)
        last = max(row[column] for row in found.config.site_layers or [])
        if last > depth:
            raise CheckpointError(
                f"{found.path}: the models meet at block {last} of {name!r}, and the one at hand has {depth} blocks; "
                "load the base it was made with"
            )
