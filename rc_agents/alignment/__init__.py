"""Where models meet: in depth (which block) and in text (which token)."""

from .depth import anchor_sites, matching_layers
from .streams import Row, SpanText, read_index
from .tokens import TokenBytes, same_tokenizer

__all__ = [
    "Row",
    "SpanText",
    "TokenBytes",
    "anchor_sites",
    "matching_layers",
    "read_index",
    "same_tokenizer",
]
