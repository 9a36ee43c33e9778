"""Scores of one Hugging Face causal model: a frozen one, one with an adapter, or an ensemble."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rc_agents.modeling import CoupledForCausalLM
from rc_agents.scoring.logits import LogitScorer
from rc_agents.training.labelled import only_at


class CausalScorer(LogitScorer):
    """Scores a causal model; only the positions that are scored go through its output layer.

    Args:
        model: in eval mode.
        tokenizer: its own; an ensemble brings the anchor's.
        specialists: who speaks in an ensemble; None for all, an empty list for the frozen anchor.
        options: as for `LogitScorer`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        specialists: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        ended: Any = getattr(model.generation_config, "eos_token_id", None)
        super().__init__(
            tokenizer if tokenizer is not None else getattr(model, "tokenizer", None),
            eos=ended if isinstance(ended, list) else [ended],
            device=model.device,
            **options,
        )
        self.model = model
        coupled = isinstance(model, CoupledForCausalLM)
        self.call = {} if specialists is None else {"specialists": list(specialists)}
        speaking = model.specialists if coupled and specialists is None else specialists or ()
        self.num_models = 1 + len(speaking)
        self.narrow = not coupled or model.mixer.kind == "anchor"
        self.reads_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self,
        ids_BT: Tensor,
        mask_BM: Tensor,
        keep_BT: Tensor,
        cache: Any = None,
        *,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any]:
        """Returns logits (P, V) at the positions kept, and the cache."""
        width = ids_BT.shape[1]
        arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BM, **self.call}
        if self.reads_positions:
            arguments["position_ids"] = (mask_BM.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        arguments |= {"past_key_values": cache, "use_cache": use_cache}
        self.cost.passes += self.num_models
        self.cost.tokens += self.num_models * int(mask_BM[:, -width:].sum())
        if not self.narrow:
            output = self.model(**arguments)
            return output.logits[keep_BT.to(output.logits.device)], output.get("past_key_values")
        with only_at(self.model, keep_BT):
            output = self.model(**arguments)
        return output.logits[0], output.get("past_key_values")


def trained_parameters(model: Any) -> int:
    """Returns how many values of a model can be trained."""
    return sum(p.numel() for p in model.parameters() if isinstance(p, Tensor) and p.requires_grad)


@torch.no_grad()
def outputs_at(
    model: Any, keep_BT: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor, Any]:
    """Runs a model; returns what its output layer read (P, D) and wrote (P, V) at the positions kept, and the cache."""
    read: list[Tensor] = []
    with only_at(model, keep_BT):
        handle = model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: read.append(args[0][0])
        )
        try:
            output = model(**arguments)
        finally:
            handle.remove()
    return read[0], output.logits[0], output.get("past_key_values")
