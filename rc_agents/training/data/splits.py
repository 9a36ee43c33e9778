"""Splits that share no text: by hash, and by near-duplicates."""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from rc_agents.errors import DataError
from rc_agents.training.data.near_duplicates import THRESHOLD, duplicate_groups
from rc_agents.training.data.near_duplicates import near_duplicates as pairs_between
from rc_agents.training.data.records import Record


@dataclass(frozen=True, kw_only=True)
class Split:
    """Records by use; equal texts, or equal prompts, always fall into the same part."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]


def split(
    records: Iterable[Record],
    *,
    validation: float = 0.05,
    test: float = 0.05,
    seed: int = 0,
    near_duplicates: bool = False,
    threshold: float = THRESHOLD,
) -> Split:
    """Returns a split by the hash of each document or prompt.

    A record's part depends on its own text and the seed, so it stays where it is as data grows. Records that
    near-duplicates join go where the first of their texts, in alphabetical order, would go by itself.

    Args:
        records: what to split.
        validation: its share.
        test: its share.
        seed: of the hash.
        near_duplicates: keep near-duplicates in one part too.
        threshold: what counts as one, see `near_duplicates`.
    """
    records = list(records)
    keys = [_plain(record.key) for record in records]
    if near_duplicates:
        for group in _groups(records, threshold):
            first = min(keys[place] for place in group)
            for place in group:
                keys[place] = first
    parts = Split(train=[], validation=[], test=[])
    for record, key in zip(records, keys, strict=True):
        position = _position(key, seed)
        if position < test:
            parts.test.append(record)
        elif position < test + validation:
            parts.validation.append(record)
        else:
            parts.train.append(record)
    return parts


def check_disjoint(
    train: Sequence[Record | str], *others: Sequence[Record | str], threshold: float = THRESHOLD
) -> None:
    """Checks that no two of these have a document, a prompt or a near-duplicate of one in common.

    Raises:
        DataError: they have; the message names the first pair found.
    """
    sides = {"train": train} | {f"others[{number}]": side for number, side in enumerate(others)}
    for (one, left), (other, right) in combinations(sides.items(), 2):
        for i, j, similarity in pairs_between(left, right, threshold):
            record = left[i]
            text = record if isinstance(record, str) else record.key
            raise DataError(
                f"{one}[{i}] and {other}[{j}] are near-duplicates (similarity {similarity:.2f}): {text[:60]!r}; "
                "split with near_duplicates=True, or leave one of them out"
            )


def _groups(records: Sequence[Record], threshold: float) -> list[list[int]]:
    groups = duplicate_groups(records, threshold)
    largest = max(groups, key=len, default=[])
    distinct = {_plain(records[place].key) for place in largest}
    if len(largest) > len(records) / 2 and len(distinct) > 10:
        warnings.warn(
            f"near-duplicates join {len(largest)} of {len(records)} records, which all fall into one part: "
            "raise threshold, or make prompts of fields by a Template, whose values alone are then compared",
            stacklevel=3,
        )
    return groups


def _plain(key: str) -> str:
    return " ".join(key.split())


def _position(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
