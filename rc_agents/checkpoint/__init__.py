"""Bridges on disk: safetensors, tokenizers, a config that names the bases and their fingerprints, a model card.

`config.json` is the one commit point of a save: it names the bridges' file and the tokenizers' folders by their hashes
and is replaced atomically, so that a kill at any moment leaves the old checkpoint or the new one.
"""

from .hub import push
from .loading import load
from .packs import load_edges
from .reading import identity
from .saving import save_checkpoint

__all__ = ["identity", "load", "load_edges", "push", "save_checkpoint"]
