"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def put(path: Path, make: Callable[[Path], Any]) -> None:
    """Lets `make` write a file beside its place and puts it there by one rename, so that a kill leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".making-{os.getpid()}-{path.name}")
    try:
        make(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write(path: Path, record: Any, indent: int | None = 1) -> None:
    """Writes JSON."""
    text = json.dumps(record, indent=indent) + "\n"
    put(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def read(path: Path) -> dict[str, Any]:
    """Returns the record of a cell's file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))
