"""Tokenizers in a checkpoint: each in a folder that its content names, `tokenizer-<16 digits of its hash>`.

config.json says which folder is whose and holds every file's hash; what lies beside it at the top is a copy for others.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .. import backbone
from ..errors import CheckpointError
from .files import move, write

PREFIX = "tokenizer-"
NAMES, HASHES = "tokenizers", "tokenizers_sha256"
COMMON = (
    "added_tokens.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def write_tokenizers(tokenizers: Mapping[str, Any], staging: Path) -> dict[str, Any]:
    """Writes every tokenizer once.

    Args:
        tokenizers: by model; None for a model without one.
        staging: where their folders go.

    Returns:
        What config.json says of them: each model's folder or None, and the SHA-256 of every file.
    """
    folders: dict[int, str] = {}
    hashes: dict[str, str] = {}
    for tokenizer in tokenizers.values():
        if tokenizer is None or id(tokenizer) in folders:
            continue
        place = staging / PREFIX
        tokenizer.save_pretrained(str(place))
        found = {file: _through(place / file) for file in sorted(_files(place))}
        digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
        name = folders[id(tokenizer)] = f"{PREFIX}{digest[:16]}"
        move(place, staging / name)
        shutil.rmtree(place)
        hashes |= {f"{name}/{file}": value for file, value in found.items()}
    names = {name: folders.get(id(tokenizer)) for name, tokenizer in tokenizers.items()}
    return {NAMES: names, HASHES: hashes}


def folders_in(folder: Path) -> list[Path]:
    """Returns the tokenizers' folders that lie in a folder."""
    return [
        place
        for place in folder.glob(f"{PREFIX}*")
        if re.fullmatch(f"{PREFIX}[0-9a-f]{{16}}", place.name) and place.is_dir()
    ]


def drop_others(target: Path, copies: Path) -> None:
    """Removes the tokenizer files at the top of a checkpoint that are not among the copies to come.

    An earlier save wrote them: they are in one of the folders there, or, of a checkpoint of before, have usual names.
    """
    new = _files(copies)
    old = {file for folder in folders_in(target) for file in _files(folder)}
    if not new.isdisjoint(COMMON):
        old.update(COMMON)
    for file in old - new:
        (target / file).unlink(missing_ok=True)
        if "/" in file and not list((target / file).parent.glob("*")):
            shutil.rmtree((target / file).parent, ignore_errors=True)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads a checkpoint's tokenizer.

    Raises:
        CheckpointError: Hugging Face cannot.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded: {backbone.first_line(error)}; "
            "pass tokenizers={name: tokenizer}"
        ) from error


def _files(folder: Path) -> set[str]:
    """The files in a folder and below, as paths from it."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def _through(file: Path) -> str:
    """Writes a file through to the disk; returns its SHA-256."""
    data = file.read_bytes()
    write(file, data)
    return hashlib.sha256(data).hexdigest()
