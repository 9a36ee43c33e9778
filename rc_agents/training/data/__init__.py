"""Training data: records from files, splits that share no document, batches that waste no padding."""

from .batches import Batch, Batches, collate, pack, pad, plan
from .encoding import TEXT_GROUP, Encoded, encode
from .records import Document, Pair, Record, Split, read, split

__all__ = [
    "TEXT_GROUP",
    "Batch",
    "Batches",
    "Document",
    "Encoded",
    "Pair",
    "Record",
    "Split",
    "collate",
    "encode",
    "pack",
    "pad",
    "plan",
    "read",
    "split",
]
