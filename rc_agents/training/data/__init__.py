"""Training data: records from files, splits that share no document, batches that waste no padding."""

from .batches import Batch, Batches, collate, pack, pad, plan
from .encoding import TEXT_GROUP, Encoded, Long, encode
from .near_duplicates import duplicate_groups, near_duplicates
from .reading import read
from .records import Conversation, Document, Message, Pair, Record
from .sources import Source
from .splits import Split, check_disjoint, split
from .templates import Template

__all__ = [
    "TEXT_GROUP",
    "Batch",
    "Batches",
    "Conversation",
    "Document",
    "Encoded",
    "Long",
    "Message",
    "Pair",
    "Record",
    "Source",
    "Split",
    "Template",
    "check_disjoint",
    "collate",
    "duplicate_groups",
    "encode",
    "near_duplicates",
    "pack",
    "pad",
    "plan",
    "read",
    "split",
]
