"""Frozen language models, coupled inside one forward pass."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import BridgeConfig, CouplingConfig, ModelRef
from .errors import RCError
from .modeling import CoupledForCausalLM, CoupledOutput, couple
from .planning import Link, Machine, Plan, plan
from .sparse import Spared, Sparse
from .topology import Edge, Topology

if TYPE_CHECKING:
    from .graph import LatentGraph

__version__ = "0.1.0"

__all__ = [
    "BridgeConfig",
    "CoupledForCausalLM",
    "CoupledOutput",
    "CouplingConfig",
    "Edge",
    "LatentGraph",
    "Link",
    "Machine",
    "ModelRef",
    "Plan",
    "RCError",
    "Spared",
    "Sparse",
    "Topology",
    "__version__",
    "couple",
    "plan",
]


def __getattr__(name: str) -> Any:
    """Graphs bring the training code along, so they are imported where they are used."""
    if name == "LatentGraph":
        return import_module(".graph", __name__).LatentGraph
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
