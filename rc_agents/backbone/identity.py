"""What tells one base from another."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from .. import packaged
from ..config import ModelRef
from ..errors import ModelError


def fingerprint(ref: ModelRef, model: PreTrainedModel | None = None) -> str:
    """Returns a hash that tells one base from another.

    Of a directory: its weight files and its adapter's weights and config. Of a hub id: the id and the commit that was
    loaded. Of a live model: its weights. Never of merged tensors, which differ between math libraries.
    """
    digest = hashlib.sha256()
    if ref.base is None:
        if model is None:
            raise ModelError(
                "a model without path or id can only be fingerprinted while it is loaded"
            )
        return "weights:" + weights_hash(model)
    parts = [(ref.base, ref.revision, ref.subfolder or "", "config.json")]
    if ref.adapter is not None:
        parts.append((ref.adapter, ref.adapter_revision, "", "adapter_config.json"))
    for part, revision, subfolder, file in parts:
        if packaged.is_packaged(part):
            digest.update(f"{part}@{packaged.fingerprint(part)}".encode())
        elif Path(part).is_dir():
            _hash_folder(digest, Path(part) / subfolder)
        else:
            digest.update(f"{part}@{_commit(part, revision, str(Path(subfolder) / file))}".encode())
    return "files:" + digest.hexdigest()


def _commit(repo_id: str, revision: str | None, file: str) -> str:
    """Returns the commit of a hub repository that lies in the cache, by a file that was loaded from it."""
    found = try_to_load_from_cache(repo_id, file, revision=revision or "main")
    commit = re.search(r"snapshots[/\\]([0-9a-f]{40})", found) if isinstance(found, str) else None
    return commit[1] if commit else revision or "main"


def _hash_folder(digest: Any, folder: Path) -> None:
    files = [*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")]
    for path in sorted(files):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)


def weights_hash(model: nn.Module) -> str:
    """Returns the SHA-256 of all weights, by name."""
    digest = hashlib.sha256()
    for name, held in sorted(model.state_dict(keep_vars=True).items()):
        tensor = _fetched(model, name) if held.is_meta else held
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        for part in held_parts(tensor):
            flat = part.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def held_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the tensors that hold a tensor's numbers: itself, or integers and scales of a quantized one."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from held_parts(getattr(tensor, name))


def _fetched(model: nn.Module, name: str) -> torch.Tensor:
    """Returns a weight that an offload hook keeps in memory or on disk."""
    place, _, leaf = name.rpartition(".")
    owner = model.get_submodule(place)
    with align_module_device(owner):
        return getattr(owner, leaf).clone()
