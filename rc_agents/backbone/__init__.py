"""A frozen causal language model or encoder: load it, freeze it, find its blocks, tap them."""

from .blocks import accepted_arguments, cache_argument, find_blocks, num_blocks, stream_width
from .checks import check
from .encoders import (
    Encoded,
    checked,
    encode,
    encoder_config,
    encoder_states,
    is_encoder,
    shortest_inputs,
)
from .identity import fingerprint, held_parts, weights_hash
from .lens import Lens, StandIn, returns_tuple
from .loading import first_line, freeze, load, load_tokenizer, locate, share_weights, skeleton
from .processors import load_processor
from .taps import ARRIVE, OWNER, tap

__all__ = [
    "ARRIVE",
    "OWNER",
    "Encoded",
    "Lens",
    "StandIn",
    "accepted_arguments",
    "cache_argument",
    "check",
    "checked",
    "encode",
    "encoder_config",
    "encoder_states",
    "find_blocks",
    "fingerprint",
    "first_line",
    "freeze",
    "held_parts",
    "is_encoder",
    "load",
    "load_processor",
    "load_tokenizer",
    "locate",
    "num_blocks",
    "returns_tuple",
    "share_weights",
    "shortest_inputs",
    "skeleton",
    "stream_width",
    "tap",
    "weights_hash",
]
