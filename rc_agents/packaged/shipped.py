"""What rc_agents itself ships, in `rc_agents/assets`: specialist adapters and the demo's ensemble."""

import hashlib
from pathlib import Path

from rc_agents.errors import PackageError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = ("package:medical-coding", "package:python", "package:demo")


def folder(name: str) -> Path:
    """Returns the folder of an adapter or ensemble that comes with rc_agents.

    Raises:
        PackageError: this copy of rc_agents was made without it.
    """
    path = ASSETS / name.removeprefix("package:")
    if not any(path.glob("*.safetensors")):
        raise PackageError(f"{name} is not in this copy of rc_agents: run  make assets")
    return path


def fingerprint(name: str) -> str:
    """Returns the hash of its weights and of the configs that say how they are applied."""
    path, digest = folder(name), hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*config.json")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
