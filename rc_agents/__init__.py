"""Frozen language models, coupled inside one forward pass."""

from .config import BridgeConfig, CouplingConfig, ModelRef
from .errors import RCError
from .modeling import CoupledForCausalLM, CoupledOutput, couple
from .planning import Link, Machine, Plan, plan
from .sparse import Spared, Sparse
from .topology import Edge, Topology

__version__ = "0.1.0"

__all__ = [
    "BridgeConfig",
    "CoupledForCausalLM",
    "CoupledOutput",
    "CouplingConfig",
    "Edge",
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
