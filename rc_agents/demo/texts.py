"""Packaged text in train, validation and test documents, the same for every recipe and for the demo."""

from rc_agents import packaged
from rc_agents.training import data

SEED = 0
TEST_SHARE = 0.1


def split(kind: str) -> data.Split:
    """Returns the documents of one kind by use: train on the first part, measure on the last.

    Args:
        kind: one of `packaged.TEXTS`.
    """
    records = data.read(packaged.text(kind))
    return data.split(records, validation=0.05, test=TEST_SHARE, seed=SEED)
