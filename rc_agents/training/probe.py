"""What the bridges do while they train: how open each gate is, and how much each bridge adds.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rc_agents.modeling import CoupledForCausalLM

GATE, NORM = "gate", "norm"

Note = Callable[[str, float], None]


class Probe:
    """Reads gates and contributions from the bridges' own calls, as means over the batch's real tokens.

    `gate/SOURCE__TARGET/SITE` is the gate's mean, `norm/SOURCE__TARGET/SITE` the mean L2 norm of what the bridge adds
    to the target's stream.
    """

    def __init__(self, model: CoupledForCausalLM) -> None:
        self.bridges = {
            f"{edge.key}/{site}": model.bridge(edge, site)
            for edge in model.edges
            for site in range(len(model.sites))
        }

    @contextmanager
    def listening(self, mask_BT: Tensor, note: Note) -> Iterator[None]:
        """Notes the values of every bridge that speaks inside the block."""
        handles = []
        for name, bridge in self.bridges.items():
            for prefix, module, read in ((GATE, bridge.gate, _value), (NORM, bridge, _norm)):
                hook = _hook(f"{prefix}/{name}", read, mask_BT, note)
                handles.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hook(
    name: str, read: Callable[[Any, Tensor], float], mask_BT: Tensor, note: Note
) -> Callable[..., None]:
    def after(module: nn.Module, args: Any, output: Any) -> None:
        note(name, read(output, mask_BT))

    return after


def _value(gate: Tensor | float, mask_BT: Tensor) -> float:
    if not isinstance(gate, Tensor):
        return gate
    if gate.dim() < 2:
        return gate.item()
    return _mean(gate[..., 0], mask_BT)


def _norm(update_BTD: Tensor, mask_BT: Tensor) -> float:
    return _mean(update_BTD.detach().float().norm(dim=-1), mask_BT)


def _mean(values_BT: Tensor, mask_BT: Tensor) -> float:
    """The mean over real tokens; over all where the values are of another model's own tokens."""
    values_BT = values_BT.detach()
    if values_BT.shape != mask_BT.shape:
        return values_BT.float().mean().item()
    return values_BT[mask_BT.bool().to(values_BT.device)].float().mean().item()
