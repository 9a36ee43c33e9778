"""What the bridges of a saved ensemble have seen, for methods that shall train on the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rc_agents.demo import recipe_bridges
from rc_agents.training import data


@dataclass(frozen=True)
class Lessons:
    """Training data of an ensemble.

    Attributes:
        known: from a bench to what a specialist knows.
        silent: to where the anchor shall stay as it is.
    """

    known: Callable[[Any], list[data.Record]]
    silent: Callable[[Any], list[data.Record]]


def _known(bench: Any) -> list[data.Record]:
    each = recipe_bridges.known(bench.tokenizer)
    return [record for records in each.values() for record in records]


LESSONS = {
    "demo": Lessons(known=_known, silent=lambda bench: recipe_bridges.silent(bench.frozen)),
}
