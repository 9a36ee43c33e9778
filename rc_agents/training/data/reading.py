"""Records from files, folders, Hugging Face datasets and objects."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rc_agents.errors import DataError
from rc_agents.training.data import sources
from rc_agents.training.data.records import Record, record
from rc_agents.training.data.sources import Source
from rc_agents.training.data.templates import Template, apply

TEXT_SUFFIXES = (".txt", ".md", ".py")

_Item = tuple[str, Any]  # what an error calls it, and what is there


def read(
    source: str | Path | Source | Iterable[Record | Mapping[str, Any] | str],
    *,
    templates: Sequence[Template] = (),
) -> list[Record]:
    """Returns the records of a file, a folder, a Hugging Face dataset, or of objects.

    A row is `{"text": ...}`, `{"prompt": ..., "completion": ...}`, `{"question": ..., "answer": ...}` or
    `{"messages": [{"role": ..., "content": ...}, ...]}`; pairs and messages may name their `"group"`,
    and a pair whose completion was cut off says `"ends": false`.

    Args:
        source: a JSONL file; a text or Python file, which is one document; a folder of those; a table that
            `datasets` reads, which is a file of Parquet, Arrow, CSV or JSON, a folder made by
            `save_to_disk` or one with Parquet or Arrow files; a `Source`, or its text `hf:NAME?...`; objects.
        templates: how to put a row into words, one record each; the row's fields may then have any name.

    Raises:
        DataError: nothing there, nothing readable in it, or a malformed row, which is named.
        PackageError: `datasets` is needed and not installed.
    """
    records: list[Record] = []
    for where, item in _items(source):
        records += apply(templates, item, where) if templates else [record(item, where)]
    if not records:
        name = source if isinstance(source, str | Path | Source) else "the records given"
        raise DataError(f"no training data in {name}")
    return records


def _items(source: Any) -> Iterable[_Item]:
    if isinstance(source, str | Path):
        if str(source).startswith(sources.PREFIX):
            return _rows(sources.parse(str(source)))
        path = Path(source).expanduser()
        return _rows(Source(dataset=path)) if sources.is_table(path) else _path_items(path)
    if isinstance(source, Source):
        return _rows(source)
    return ((f"record {number}", item) for number, item in enumerate(source, start=1))


def _rows(source: Source) -> list[_Item]:
    """Returns the rows of a dataset without its blank ones, such as lie between WikiText's paragraphs."""
    rows = list(enumerate(source, start=1))
    kept = [(f"row {number} of {source}", row) for number, row in rows if not _is_blank(row)]
    if 0 < len(kept) < len(rows):
        warnings.warn(f"{source}: {len(rows) - len(kept)} blank rows are left out", stacklevel=4)
    return kept


def _is_blank(row: Mapping[str, Any]) -> bool:
    return all(
        value is None or (isinstance(value, str) and not value.strip()) for value in row.values()
    )


def _path_items(path: Path) -> Iterator[_Item]:
    if not path.exists():
        raise DataError(f"training data {path} does not exist")
    files = [path]
    if path.is_dir():
        readable = (*TEXT_SUFFIXES, ".jsonl")
        files = sorted(f for f in path.rglob("*") if f.suffix in readable and f.is_file())
        if not files:
            raise DataError(
                f"folder {path} has no {', '.join(TEXT_SUFFIXES)} or .jsonl file; "
                f"if it holds tables, read it as {sources.PREFIX}{path}"
            )
    for file in files:
        yield from _file_items(file)


def _file_items(path: Path) -> Iterator[_Item]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"training data {path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    elif text.strip():
        yield str(path), text


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
