"""Bridges between residual streams: one kind a file, one registration line each."""

from .base import Bridge, rms
from .bottleneck import BottleneckMap
from .gate import FixedGate, Gate, ScalarGate, TokenGate
from .linear import LinearMap
from .low_rank import LowRankMap
from .named import Named
from .pooling import QueryPool
from .prediction import Prediction
from .random import RandomMap
from .router import Router

__all__ = [
    "BottleneckMap",
    "Bridge",
    "FixedGate",
    "Gate",
    "LinearMap",
    "LowRankMap",
    "Named",
    "Prediction",
    "QueryPool",
    "RandomMap",
    "Router",
    "ScalarGate",
    "TokenGate",
    "rms",
]
