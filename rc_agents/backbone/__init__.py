"""A frozen causal language model: load it, freeze it, find its blocks, tap them."""

from .blocks import accepted_arguments, cache_argument, find_blocks, num_blocks, stream_width
from .checks import check
from .identity import fingerprint, held_parts, weights_hash
from .lens import Lens, StandIn, returns_tuple
from .loading import first_line, freeze, load, load_tokenizer, locate, share_weights, skeleton
from .taps import ARRIVE, OWNER, tap

__all__ = [
    "ARRIVE",
    "OWNER",
    "Lens",
    "StandIn",
    "accepted_arguments",
    "cache_argument",
    "check",
    "find_blocks",
    "fingerprint",
    "first_line",
    "freeze",
    "held_parts",
    "load",
    "load_tokenizer",
    "locate",
    "num_blocks",
    "returns_tuple",
    "share_weights",
    "skeleton",
    "stream_width",
    "tap",
    "weights_hash",
]
