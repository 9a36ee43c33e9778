"""What a model would say if a state were its last: the output layer, and whatever lies before it, on any state.

The logit lens (nostalgebraist, 2020). Shapes: N states, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .blocks import find_blocks
from .loading import share_weights

_ENTERING: ContextVar[Tensor] = ContextVar("rc_agents_entering")


class StandIn(nn.Module):
    """Stands where a block stood: lets the states through, or gives others in their place.

    Args:
        block: that stood there.
        gives: the states to give; None to let through what comes.
        returns_tuple: whether the block gives its states in a tuple.
    """

    def __init__(
        self, block: nn.Module, gives: Callable[[], Tensor] | None, returns_tuple: bool
    ) -> None:
        super().__init__()
        object.__setattr__(
            self, "block", block
        )  # read for its attributes; its weights are not ours
        self.gives, self.returns_tuple = gives, returns_tuple

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns the states as the block would."""
        states = hidden_states if self.gives is None else self.gives()
        return (states,) if self.returns_tuple else states


class Lens:
    """A model's output side alone; the weights are the model's own, and none is a parameter of who holds the lens.

    Args:
        model: any causal language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.of = model
        self.returns_tuple = returns_tuple(model, len(find_blocks(model)))
        self._build()

    def _build(self) -> None:
        place, model = _place(self.of), share_weights(self.of).eval()
        blocks = find_blocks(model)
        for index, block in enumerate(list(blocks)):
            last = index == len(blocks) - 1
            blocks[index] = StandIn(block, _ENTERING.get if last else None, self.returns_tuple)
        self.model, self.place = model, place

    def __call__(self, states_ND: Tensor) -> Tensor:
        """Returns the logits (N, V)."""
        if _place(self.of) != self.place:
            self._build()  # buffers are not shared once a model has moved
        like: Any = self.model.get_input_embeddings().weight
        head: Any = self.model.get_output_embeddings().weight
        token = _ENTERING.set(states_ND.to(head.device, head.dtype)[:, None])
        try:
            ids = torch.zeros(len(states_ND), 1, dtype=torch.long, device=like.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits[:, 0]
        finally:
            _ENTERING.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lens:
        return self  # frozen


def _place(model: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    weight: Any = model.get_output_embeddings().weight
    return weight.device, weight.dtype


def returns_tuple(model: PreTrainedModel, layer: int) -> bool:
    """Returns whether a block, counted from 1, gives its states in a tuple."""
    seen: list[bool] = []
    handle = find_blocks(model)[layer - 1].register_forward_hook(
        lambda module, args, output: seen.append(isinstance(output, tuple))
    )
    try:
        with torch.no_grad():
            model(torch.arange(4, device=model.device)[None], use_cache=False)
    finally:
        handle.remove()
    return seen[0]
