"""Checkpoints of a run: folders that are whole or not there, of which the last few are kept.

A checkpoint is written beside its place, every file through to the disk, its manifest with their hashes last, and then
renamed. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from rc_agents.checkpoint.files import write
from rc_agents.errors import TrainingError

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING = ".saving-"


def save(folder: Path, step: int, files: Mapping[str, bytes], *, keep: int) -> Path:
    """Writes a checkpoint and removes all but the last `keep`.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; earlier checkpoints are as they were.
    """
    place = folder / f"checkpoint-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
        for name, content in files.items():
            write(staging / name, content)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        write(staging / MANIFEST, json.dumps(hashes, indent=2).encode())
        _sync(staging)
        shutil.rmtree(
            place, ignore_errors=True
        )  # a damaged one, which a resumed run comes by again
        staging.replace(place)
        _sync(folder)
    except OSError as error:
        clear(folder)
        raise TrainingError(
            f"cannot save a checkpoint to {folder}: {error.strerror or error}; make room and resume"
        ) from error
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"checkpoint-{old}", ignore_errors=True)
    return place


def clear(folder: Path) -> None:
    """Removes what a killed save left."""
    for left in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint, whole or not, in order."""
    names = [_NAME.fullmatch(place.name) for place in folder.glob("checkpoint-*")]
    return sorted(int(name[1]) for name in names if name)


def last(folder: Path) -> Path | None:
    """Returns the last whole checkpoint, warning about damaged ones after it; None where there never was one.

    Raises:
        TrainingError: there are checkpoints, and all are damaged.
    """
    found = steps(folder)
    for step in reversed(found):
        place = folder / f"checkpoint-{step}"
        reason = damage(place)
        if reason is None:
            return place
        warnings.warn(
            f"checkpoint {place} is damaged ({reason}); trying the one before", stacklevel=3
        )
    if found:
        raise TrainingError(
            f"nothing to resume: all {len(found)} checkpoints in {folder} are damaged; start anew without resume"
        )
    return None


def damage(place: Path) -> str | None:
    """Returns what is wrong with a checkpoint, None where every file is as it was written."""
    try:
        hashes = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in hashes.items():
            if hashlib.sha256((place / name).read_bytes()).hexdigest() != digest:
                return f"{name} is truncated or altered"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"its manifest cannot be read: {type(error).__name__}"
    return None


def _sync(folder: Path) -> None:
    """Writes a folder's list of names through to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
