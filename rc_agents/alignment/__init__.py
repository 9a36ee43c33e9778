"""Where models meet: in depth (which block) and in text (which token)."""

from .clock import Clock
from .depth import Sites, anchor_sites, matching_layers, site_rows
from .script import Chat, Script
from .segments import Segments
from .streams import AS_BEFORE, NOTHING, Branch, Row, SpanText
from .tokens import TokenBytes, check_spells, same_tokenizer

__all__ = [
    "AS_BEFORE",
    "NOTHING",
    "Branch",
    "Chat",
    "Clock",
    "Row",
    "Script",
    "Segments",
    "Sites",
    "SpanText",
    "TokenBytes",
    "anchor_sites",
    "check_spells",
    "matching_layers",
    "same_tokenizer",
    "site_rows",
]
