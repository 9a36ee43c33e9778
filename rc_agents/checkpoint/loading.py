"""Builds an ensemble from a checkpoint and its bases: all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download

from .. import backbone, planning
from ..alignment import same_tokenizer
from ..assembly import Loader, Member, alignment_of
from ..config import CouplingConfig, ModelRef, check_choice
from ..errors import CheckpointError, ConfigError, ModelError, nearest
from ..topology import ANCHOR
from .identity import check_fingerprint, put
from .reading import Checkpoint, read
from .saving import BASES
from .tokenizers import load_tokenizer

if TYPE_CHECKING:
    from ..execution import Elsewhere
    from ..modeling import CoupledForCausalLM

HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")
PLACED = ("device_map", "dtype", "quantization", "max_memory", "offload_folder")
KNOWN = (*PLACED, "schedule", "bases", "tokenizers", "check_fingerprints", *HUB)
FROM_AUTO = {"_from_auto", "adapter_kwargs", "config"}


def load(
    cls: type[CoupledForCausalLM],
    path: str | Path,
    *,
    device_map: Any = None,
    dtype: Any = None,
    quantization: Any = None,
    max_memory: Any = None,
    offload_folder: str | Path | None = None,
    schedule: str | None = None,
    bases: Mapping[str, str | Path] | None = None,
    tokenizers: Mapping[str, Any] | None = None,
    check_fingerprints: bool = True,
    trust_remote_code: bool = False,
    local: str | None = None,
    elsewhere: Elsewhere | None = None,
    **kwargs: Any,
) -> CoupledForCausalLM:
    """Loads an ensemble; see `CoupledForCausalLM.from_pretrained`.

    With `local` only this model is loaded with its weights, as the others run elsewhere.
    """
    hub = {key: kwargs.pop(key) for key in HUB if key in kwargs}
    dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
    if unknown := sorted(kwargs.keys() - FROM_AUTO):
        raise ConfigError(
            f"from_pretrained got an unknown argument {unknown[0]!r}; {nearest(unknown[0], KNOWN)}"
        )
    found = read(path, **hub)
    config, names = found.config, found.config.names or []
    _check_asked(config, schedule, local, bases=bases, tokenizers=tokenizers)
    config.schedule = schedule or config.schedule
    here = [name for name in names if local in (None, name)]
    moved, given = dict(bases or {}), dict(tokenizers or {})
    _fetch_bases(found, [name for name in here if name not in moved], hub)
    saved = config.models or {}
    refs = {
        name: _resolved(ModelRef(**saved[name]), found.folder, moved.get(name)) for name in names
    }
    dtype = {**(config.dtypes or {}), **dtype} if isinstance(dtype, dict) else dtype
    placed = {"dtype": dtype or config.dtypes, "quantization": quantization}
    if local is None:  # a model by itself needs no plan beside others
        device_map = _planned(config, refs, device_map, max_memory, trust_remote_code, placed)
    chosen = {**_saved_tokenizers(found, given, trust_remote_code), **given}
    loader = Loader(
        names,
        device_map,
        tokenizers=chosen,
        trust_remote_code=trust_remote_code,
        offload_folder=offload_folder,
        **placed,
    )
    for name, ref in refs.items():
        if name in here:
            _load_base(loader, found, name, ref, name in moved, check_fingerprints)
        else:
            loader.members[name] = _remote(found, name, chosen)
    _check_depths(found, loader)
    _settle_tokenizers(loader, config, given, [] if check_fingerprints else list(moved))
    config.model_configs = {name: member.model.config for name, member in loader.members.items()}
    ensemble = cls(config, loader.members, elsewhere)
    put(ensemble, found.tensors, found.path)
    ensemble.generation_config = found.generation
    ensemble.name_or_path = found.path
    return ensemble


def _check_asked(
    config: CouplingConfig,
    schedule: str | None,
    local: str | None,
    **by_model: Mapping[str, Any] | None,
) -> None:
    """Refuses names that the ensemble has not, a schedule that there is not, and encoders in several processes."""
    names = config.names or []
    if schedule is not None:
        check_choice("schedule", schedule)
    if local is not None:
        by_model = {"local": {local: ""}, **by_model}
    _check_names(names, **by_model)
    if local is not None and config.encoder_names:
        raise ConfigError(
            f"{config.encoder_names[0]!r} is an encoder, whose states do not cross processes; "
            "run this ensemble in one process"
        )


def _planned(
    config: CouplingConfig,
    refs: Mapping[str, ModelRef],
    device_map: Any,
    max_memory: Any,
    trust_remote_code: bool,
    placed: Mapping[str, Any],
) -> Any:
    """Where models go, each beside the others and the bridges."""
    names = list(refs)
    return planning.resolved(
        device_map,
        refs[ANCHOR],
        {name: refs[name] for name in names[1:]},
        max_memory=max_memory,
        topology=config.topology,
        bridge=config.bridge,
        sites=[dict(zip(names, row, strict=True)) for row in config.site_layers or []],
        trust_remote_code=trust_remote_code,
        **placed,
    )


def _check_names(names: Sequence[str], **arguments: Mapping[str, Any] | None) -> None:
    for argument, by_name in arguments.items():
        for name in by_name or {}:
            if name not in names:
                raise ConfigError(
                    f"{argument} names an unknown model {name!r}; {nearest(name, names)}"
                )


def _fetch_bases(found: Checkpoint, names: Sequence[str], hub: Mapping[str, Any]) -> None:
    """Downloads the bases that lie in a checkpoint on the hub, at the commit of its config.json."""
    places = [(found.config.models or {})[name].get("base") or "" for name in names]
    inside = [place for place in places if place.startswith(f"{BASES}/")]
    wanted = [f"{place}/*" for place in inside if not (found.folder / place).is_dir()]
    if not wanted or Path(found.path).is_dir():
        return
    options = {key: value for key, value in hub.items() if key not in ("revision", "proxies")}
    try:
        snapshot_download(found.path, revision=found.folder.name, allow_patterns=wanted, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{found.path}: the bases in it cannot be downloaded: {backbone.first_line(error)}"
        ) from error


def _load_base(
    loader: Loader, found: Checkpoint, name: str, ref: ModelRef, moved: bool, check: bool
) -> None:
    try:
        member = loader.add(name, ref)
    except ModelError as error:
        raise CheckpointError(
            f"{found.path}: the base of {name!r} is missing or unusable, name its place with "
            f"bases={{{name!r}: ...}}: {error}"
        ) from error
    prints = dict(found.config.fingerprints or {})
    if check:
        _check(loader, found, member, prints.get(name))
    if moved or not check:
        prints.pop(name, None)  # the next save makes it anew
    found.config.fingerprints = prints
    found.config.models = {**(found.config.models or {}), name: member.ref.to_dict()}


def _remote(found: Checkpoint, name: str, tokenizers: Mapping[str, Any]) -> Member:
    """A model that another process holds: what its config tells."""
    ref = ModelRef(**(found.config.models or {})[name])
    config, dtype = (found.config.model_configs or {})[name], (found.config.dtypes or {}).get(name)
    model = backbone.skeleton(config, dtype)
    return Member(name, ref, model, tokenizers.get(name), remote=True)


def _check(loader: Loader, found: Checkpoint, member: Member, wanted: str | None) -> None:
    """Checks a base's fingerprint; one of weights is that of one dtype, in which they are loaded once more."""
    saved = (found.config.dtypes or {}).get(member.name)
    altered = member.ref.quantization or str(member.model.dtype) != f"torch.{saved}"
    if wanted and wanted.startswith("weights:") and altered:
        plain = replace(member.ref, quantization=None)
        model = backbone.load(
            member.name, plain, dtype=saved, trust_remote_code=loader.trust_remote_code
        )
        member = replace(member, model=model)
    check_fingerprint(found.path, wanted, member)


def _saved_tokenizers(
    found: Checkpoint, given: Mapping[str, Any], trust_remote_code: bool
) -> dict[str, Any]:
    """Loads every tokenizer of the checkpoint once, but for those that are given."""
    folders = {name: folder for name, folder in found.tokenizers.items() if name not in given}
    loaded = {
        folder: load_tokenizer(folder, trust_remote_code=trust_remote_code)
        for folder in dict.fromkeys(folders.values())
        if folder is not None
    }
    return {name: folder and loaded[folder] for name, folder in folders.items()}


def _settle_tokenizers(
    loader: Loader, config: CouplingConfig, given: Mapping[str, Any], moved: Sequence[str]
) -> None:
    """Gives bases that need not be the checkpoint's their own tokenizers; checks that those which changed can align."""
    swapped = [name for name in moved if name not in given]
    for name in swapped:
        member = loader.members[name]
        own = backbone.load_tokenizer(member.ref, trust_remote_code=loader.trust_remote_code)
        if own is not None and not same_tokenizer(own, member.tokenizer):
            member.tokenizer = own
    if given or swapped:
        for name in loader.names[1:]:
            how = (config.alignment or {})[name]
            alignment_of(loader.members[ANCHOR], loader.members[name], how)


def _resolved(ref: ModelRef, folder: Path, moved: str | Path | None) -> ModelRef:
    """A base inside the checkpoint is found there; one that moved, where the user says."""
    parts = {"base": str(moved or ref.base), "adapter": ref.adapter}
    for key, part in parts.items():
        if part is not None and not Path(part).is_absolute() and (folder / part).is_dir():
            parts[key] = str((folder / part).absolute())
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
