"""Records to train on: read from files, split so that no text is on two sides."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_agents.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
_PAIR_KEYS = (("prompt", "completion"), ("question", "answer"))


@dataclass(frozen=True)
class Document:
    """A text to be learnt as it is."""

    text: str

    @property
    def key(self) -> str:
        """What tells it from other documents."""
        return self.text


@dataclass(frozen=True)
class Pair:
    """A prompt and what should follow it.

    Batches are made of pairs of one `group`, such as one prompt template; `text` is the group that
    documents have.
    """

    prompt: str
    completion: str
    group: str = ""

    @property
    def key(self) -> str:
        """What tells it from other pairs: two answers to one prompt count as the same."""
        return self.prompt


Record = Document | Pair


def read(source: str | Path | Iterable[Record | Mapping[str, Any] | str]) -> list[Record]:
    """Returns the records of a JSONL file, a text or Python file, a folder of those, or of objects.

    A JSON line is `{"text": ...}`, `{"prompt": ..., "completion": ...}` or `{"question": ...,
    "answer": ...}`; a pair may name its `"group"`. A text file is one document.

    Raises:
        DataError: nothing there, nothing readable in it, or a malformed line, which is named.
    """
    if not isinstance(source, str | Path):
        records = [_record(item, f"record {number}") for number, item in enumerate(source, start=1)]
    else:
        records = _read_path(Path(source).expanduser())
    if not records:
        where = source if isinstance(source, str | Path) else "the records given"
        raise DataError(f"no training data in {where}")
    return records


def _read_path(path: Path) -> list[Record]:
    if not path.exists():
        raise DataError(f"training data {path} does not exist")
    if path.is_file():
        return _read_file(path)
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in (*TEXT_SUFFIXES, ".jsonl") and file.is_file()
    )
    if not files:
        raise DataError(f"folder {path} has no {', '.join(TEXT_SUFFIXES)} or .jsonl file")
    return [record for file in files for record in _read_file(file)]


def _read_file(path: Path) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"training data {path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return [Document(text)] if text.strip() else []
    lines = {f"{path}:{number}": line for number, line in enumerate(text.split("\n"), start=1)}
    return [_record(_parse(line, where), where) for where, line in lines.items() if line.strip()]


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _record(item: Any, where: str) -> Record:
    if isinstance(item, Document | Pair):
        return item
    if isinstance(item, str):
        item = {"text": item}
    if isinstance(item, Mapping):
        if _filled(item, "text"):
            return Document(item["text"])
        for prompt, completion in _PAIR_KEYS:
            if _filled(item, prompt, completion):
                return Pair(item[prompt], item[completion], str(item.get("group", "")))
    found = f"keys {sorted(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
    raise DataError(
        f"{where} needs a non-empty text, prompt and completion, or question and answer, not {found}"
    )


def _filled(item: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(item.get(key), str) and item[key].strip() for key in keys)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Records by use; equal texts, or equal prompts, always fall into the same part."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]


def split(
    records: Iterable[Record], *, validation: float = 0.05, test: float = 0.05, seed: int = 0
) -> Split:
    """Returns a split by the hash of each document or prompt.

    A record's part depends on its own text and the seed, so it stays where it is as data grows.
    """
    parts = Split(train=[], validation=[], test=[])
    for record in records:
        position = _position(record.key, seed)
        if position < test:
            parts.test.append(record)
        elif position < test + validation:
            parts.validation.append(record)
        else:
            parts.train.append(record)
    return parts


def _position(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{' '.join(key.split())}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
