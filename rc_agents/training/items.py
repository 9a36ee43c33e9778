"""What a run reads: its data sets, encoded and kept apart, and one item for each batch of each step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rc_agents.errors import TrainingError
from rc_agents.training import data as training_data
from rc_agents.training.config import TrainConfig
from rc_agents.training.data import TEXT_GROUP, Encoded

Source = str | Path | Iterable[training_data.Record | Mapping[str, Any]]


@dataclass(frozen=True)
class DataSets:
    """The encoded examples of a run by use; `retain` and `validation` may be empty."""

    data: list[Encoded]
    retain: list[Encoded]
    validation: list[Encoded]

    def by_name(self) -> dict[str, list[Encoded]]:
        """Returns the sets that hold something."""
        return {name: examples for name, examples in vars(self).items() if examples}

    def kinds(self) -> set[str]:
        """Returns what there is to learn: `pairs`, `texts`."""
        return {kind_of(example) for example in self.data}

    def hashes(self) -> dict[str, str]:
        """Returns a hash of each set, the order of its examples included."""
        return {name: _hash(examples) for name, examples in self.by_name().items()}


def kind_of(example: Encoded) -> str:
    """Returns `texts` for a block of text, else `pairs`."""
    return "texts" if example.group == TEXT_GROUP else "pairs"


def _hash(examples: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.ids, example.answer_start, example.group)).encode())
        for name, shown in sorted((example.sources or {}).items()):
            digest.update(name.encode())
            for key, value in sorted(shown.items()):
                digest.update(key.encode() + _bytes(value))
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    if not isinstance(value, torch.Tensor):
        return repr(value).encode()
    return value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def read_sets(
    tokenizer: Any,
    data: Source,
    retain: Source | None,
    validation: Source | None,
    config: TrainConfig,
) -> DataSets:
    """Reads and encodes a run's data.

    Args:
        tokenizer: the anchor's.
        data: what to learn.
        retain: general text on which to stay the frozen anchor.
        validation: what to judge by; split off `data` by `config.validation_share` where left out.
        config: lengths and shares.

    Raises:
        DataError: no data, or malformed.
        TrainingError: validation and training share a prompt or a document, or one of them is empty.
    """
    records = training_data.read(data)
    held_out: list[training_data.Record] = []
    if validation is not None:
        if config.validation_share:
            raise TrainingError(
                "pass validation data or set validation_share, not both: one of them is the judge"
            )
        held_out = training_data.read(validation)
        check_disjoint(records, held_out)
    elif config.validation_share:
        parts = training_data.split(
            records, validation=config.validation_share, test=0, seed=config.seed
        )
        records, held_out = parts.train, parts.validation
        if not records or not held_out:
            raise TrainingError(
                f"validation_share={config.validation_share} leaves {len(records)} records to train on and "
                f"{len(held_out)} to judge by; pass more data, or validation data of its own"
            )
    kept = training_data.read(retain) if retain is not None and config.retain_weight else []
    return DataSets(*(_encode(tokenizer, part, config) for part in (records, kept, held_out)))


def _encode(
    tokenizer: Any, records: list[training_data.Record], config: TrainConfig
) -> list[Encoded]:
    if not records:
        return []
    lengths = {"max_length": config.max_length, "block_length": config.block_length}
    return list(training_data.encode(tokenizer, records, **lengths))


def check_disjoint(
    train: Sequence[training_data.Record], validation: Sequence[training_data.Record]
) -> None:
    """Raises `TrainingError` where a prompt or a document is in both, spaces aside."""
    known = {" ".join(record.key.split()) for record in train}
    shared = [record.key for record in validation if " ".join(record.key.split()) in known]
    if shared:
        raise TrainingError(
            f"validation and training share {len(shared)} prompts or documents, as {shared[0][:60]!r}; "
            "split them with validation_share, or by rc_agents.training.data.split"
        )


class Items(torch.utils.data.Dataset[dict[str, Any]]):
    """One item a batch, by its number alone: `data`, and `retain` where there is text to retain.

    Args:
        sets: the examples.
        config: batch sizes, mix and seed.
        count: batches of the run, over all steps and processes.
    """

    def __init__(self, sets: DataSets, config: TrainConfig, count: int) -> None:
        self.sets, self.config = sets, config
        self.plan = training_data.plan(
            sets.data,
            batch_size=config.batch_size,
            text_batch_size=config.text_batch_size,
            steps=count,
            seed=config.seed,
            mix=config.mix,
        )
        self.retained: list[list[int]] = []
        if sets.retain:
            size = config.retain_batch_size
            self.retained = training_data.plan(
                sets.retain,
                batch_size=size,
                text_batch_size=size,
                steps=count,
                seed=config.seed + 1,
            )

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> dict[str, Any]:
        item: dict[str, Any] = {"data": batch_of(self.sets.data, self.plan[number], "data")}
        item["kind"] = kind_of(self.sets.data[self.plan[number][0]])
        if self.retained:
            item["retain"] = batch_of(self.sets.retain, self.retained[number], "retain")
            if self.config.retain_positions is not None:
                rng = random.Random(f"{self.config.seed}:{number}")
                _thin_out(item["retain"], self.config.retain_positions, rng)
        return item


def batch_of(examples: Sequence[Encoded], rows: Sequence[int], dataset: str) -> dict[str, Any]:
    """Returns a batch for a `Pass`, padded on the right."""
    chosen = [examples[row] for row in rows]
    batch: dict[str, Any] = dict(training_data.pad(chosen))
    encoders = {name for example in chosen for name in example.sources or {}}
    if encoders:
        each = [example.sources or {} for example in chosen]
        batch["sources"] = {name: [one.get(name) for one in each] for name in sorted(encoders)}
    return batch | {"rows": torch.tensor(rows), "dataset": dataset}


def validation_batches(sets: DataSets, config: TrainConfig) -> list[dict[str, Any]]:
    """Returns all of the validation set in batches of one kind and of like lengths."""
    examples = sets.validation
    order = sorted(
        range(len(examples)), key=lambda row: (kind_of(examples[row]), len(examples[row].ids))
    )
    batches = []
    for kind, size in (("pairs", config.batch_size), ("texts", config.text_batch_size)):
        rows = [row for row in order if kind_of(examples[row]) == kind]
        starts = range(0, len(rows), size)
        batches += [batch_of(examples, rows[at : at + size], "validation") for at in starts]
    return batches


def _thin_out(batch: dict[str, Any], positions: int, rng: random.Random) -> None:
    """Leaves the labels of about `positions` tokens, in the same columns of every row, as the output layer likes it."""
    labels = batch["labels"]
    columns = (labels[:, 1:] != -100).any(0).nonzero()[:, 0].add(1).tolist()
    count = max(1, positions // labels.shape[0])
    dropped = sorted(set(columns) - set(rng.sample(columns, min(count, len(columns)))))
    labels[:, dropped] = -100
