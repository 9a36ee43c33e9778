"""One ensemble in several processes or on several machines: every model in its own, no weights but its own.

The anchor's process offers the usual `CoupledForCausalLM` (`connect`); each specialist's process serves its model
(`Node`). They exchange hidden states at the sites, over TCP, straight from each source to each target.
"""

from .connect import connect, launched
from .node import Node
from .roster import Event
from .settings import NodeSettings, address_of, read_secret

__all__ = [
    "Event",
    "Node",
    "NodeSettings",
    "address_of",
    "connect",
    "launched",
    "read_secret",
]
