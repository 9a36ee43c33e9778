"""Feedforward graphs of frozen models through a shared latent space."""

from .building import build
from .config import GraphConfig, LatentConfig, NodeConfig, OutputConfig
from .model import GraphOutput, LatentGraph, Signals

__all__ = [
    "GraphConfig",
    "GraphOutput",
    "LatentConfig",
    "LatentGraph",
    "NodeConfig",
    "OutputConfig",
    "Signals",
    "build",
]
