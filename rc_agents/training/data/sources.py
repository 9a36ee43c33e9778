"""Hugging Face datasets, from the hub or from disk: which rows of which columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from rc_agents.backbone import first_line
from rc_agents.errors import DataError, PackageError, nearest

PREFIX = "hf:"
TABLES = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
"""How a file ends -> which of datasets' loaders reads it."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COLUMN = "columns."
_OPTIONS = {
    **dict.fromkeys(("config", "split", "revision"), "a name"),
    **dict.fromkeys(("streaming", "shuffle"), "true or false"),
    **dict.fromkeys(("limit", "buffer_size", "seed"), "a whole number"),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows of a Hugging Face dataset; `read` makes records of them.

    For example `Source(dataset="owner/name", columns={"prompt": "instruction", "completion": "output"})`, or
    on a command line `hf:owner/name?split=train&columns.prompt=instruction&columns.completion=output`.

    Args:
        dataset: a hub id, or a path: a folder made by `save_to_disk` or with data files, or one file of
            Parquet, CSV or JSON.
        config: the configuration, where a dataset has several.
        split: which part; also a slice of it, such as `train[:10%]`, where it is not streamed.
        revision: branch, tag or commit on the hub.
        columns: name that a record, or a template, reads -> column of the dataset. By default every column
            goes by its own name.
        streaming: read rows as they are needed instead of downloading all; needs `limit`.
        limit: the most rows read.
        shuffle: read the rows in an order that `seed` decides.
        buffer_size: rows among which the next is chosen where a stream is shuffled.
        seed: of the order.

    Raises:
        DataError: settings that contradict one another.
    """

    dataset: str | Path
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    streaming: bool = False
    limit: int | None = None
    shuffle: bool = False
    buffer_size: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "buffer_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise DataError(f"{name} of {self} is a whole number above 0, not {value!r}")
        if self.streaming and self.limit is None:
            raise DataError(
                f"streaming {self} needs limit=, the most rows to read: a stream may not end"
            )

    def __str__(self) -> str:
        return f"dataset {self.dataset}"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the rows, each with what `columns` names.

        Raises:
            PackageError: `datasets` is not installed.
            DataError: the dataset, its configuration, split or a column is not there, or cannot be read.
        """
        errors = _errors()
        try:
            yield from _rows(self)
        except errors as error:
            if isinstance(error, DataError | PackageError):
                raise
            reason = first_line(
                error.__cause__ or error
            )  # the cause says more of a generation error
            raise DataError(f"{self} cannot be read: {reason}") from error


def parse(text: str) -> Source:
    """Returns the source that `hf:NAME?OPTION=VALUE&...` names; the fields of `Source` are the options.

    Raises:
        DataError: an unknown option, or a value of the wrong type.
    """
    place, _, query = text.removeprefix(PREFIX).partition("?")
    if not place:
        raise DataError(f"{text!r} names no dataset: write {PREFIX}owner/name or {PREFIX}path")
    options: dict[str, Any] = {}
    columns: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name.startswith(_COLUMN):
            columns[name.removeprefix(_COLUMN)] = value
        else:
            options[name] = _option(text, name, value)
    return Source(dataset=place, columns=columns, **options)


def _option(text: str, name: str, value: str) -> str | int | bool:
    if name not in _OPTIONS:
        known = nearest(name, [*_OPTIONS, f"{_COLUMN}NAME"])
        raise DataError(f"{text!r} has no option {name!r}; {known}")
    expected = _OPTIONS[name]
    if expected == "true or false" and value in ("true", "false"):
        return value == "true"
    if expected == "a whole number" and value.isdecimal():
        return int(value)
    if expected == "a name" and value:
        return value
    raise DataError(f"option {name!r} of {text!r} needs {expected}, not {value!r}")


def _hf() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise PackageError(
            "Hugging Face datasets need the Python package datasets, which is not installed: "
            "run  pip install 'rc-agents[data]'"
        ) from error
    return datasets


def _errors() -> tuple[type[Exception], ...]:
    """What goes wrong with a dataset that is absent, refused or malformed; the rest is nobody's fault but ours."""
    return (OSError, ValueError, _hf().exceptions.DatasetsError)


def _rows(source: Source) -> Iterator[dict[str, Any]]:
    rows = _load(source)
    if source.shuffle:
        sizes = {"buffer_size": source.buffer_size} if source.streaming else {}
        rows = rows.shuffle(seed=source.seed, **sizes)
    for row in islice(rows, source.limit):
        yield _picked(source, row)


def _picked(source: Source, row: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns that the source names, all where it names none."""
    for column in source.columns.values():
        if column not in row:
            raise DataError(f"{source} has no column {column!r}; {nearest(column, row)}")
    return {name: row[column] for name, column in source.columns.items()} or row


def _load(source: Source) -> Any:
    """Returns the split, as a `Dataset` or, streamed, an `IterableDataset`."""
    datasets, path = _hf(), Path(source.dataset).expanduser()
    if _is_saved(path):
        return _saved_split(source, datasets.load_from_disk(str(path)))
    place: dict[str, Any] = {"path": str(source.dataset), "revision": source.revision}
    if path.is_file():
        kind = TABLES.get(path.suffix)
        if kind is None:
            raise DataError(f"{source} is no table: expected a file ending in {', '.join(TABLES)}")
        place = {"path": kind, "data_files": {"train": str(path)}}
    elif path.is_dir():
        place = {"path": str(path)}
    elif not _HUB_ID.fullmatch(str(source.dataset)) or path.suffix in TABLES:
        raise DataError(f"{source} does not exist, and its name is no hub id such as owner/name")
    return datasets.load_dataset(
        **place, name=source.config, split=source.split, streaming=source.streaming
    )


def is_table(path: Path) -> bool:
    """Returns whether a path is for `datasets` to read, rather than text or lines of JSON."""
    if path.is_dir():
        return _is_saved(path) or any(f.suffix in (".parquet", ".arrow") for f in path.rglob("*"))
    return path.is_file() and path.suffix in TABLES and path.suffix != ".jsonl"


def _is_saved(path: Path) -> bool:
    """Returns whether a folder was made by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved_split(source: Source, saved: Any) -> Any:
    if isinstance(saved, dict):
        if source.split not in saved:
            raise DataError(
                f"{source} has no split {source.split!r}; {nearest(source.split, saved)}"
            )
        saved = saved[source.split]
    elif source.split not in ("train", str(saved.split)):
        raise DataError(f"{source} was saved as one split, so it has no {source.split!r}")
    return saved.to_iterable_dataset() if source.streaming else saved
