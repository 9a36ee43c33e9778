"""An ensemble as lm-eval's Hugging Face model: its batching, truncation and scoring, unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from rc_agents import CoupledForCausalLM
from rc_agents.service import GenerationParams, GenerationService, load

from .running import quiet

LOADING = ("device_map", "dtype", "trust_remote_code")


@register_model("rc_agents")
class EnsembleLM(HFLM):
    """lm-eval's `hf` model over an ensemble.

    Args:
        pretrained: a live ensemble, or what `rc_agents.service.load` takes: a folder, a hub id, `package:NAME`.
        specialists: names that take part, as a list or as `a+b` (lm-eval splits its arguments at commas); "none" for
            the anchor alone; None for all.
        strength: factor on every bridge's update, or a dict by specialist.
        max_length: of a text in the anchor's tokens; None for the shortest context among the models that read them.
            Set it lower where a specialist with a tokenizer of its own would need more tokens than its context holds.
        options: `device_map`, `dtype` and `trust_remote_code` for loading; all else goes to lm-eval's `HFLM`.

    Raises:
        RCError: no such ensemble or specialist.
    """

    def __init__(
        self,
        pretrained: str | Path | CoupledForCausalLM,
        *,
        specialists: str | Sequence[str] | None = None,
        strength: float | Mapping[str, float] | None = None,
        max_length: int | None = None,
        device: Any = None,
        **options: Any,
    ) -> None:
        loading = {
            key: options.pop(key) for key in LOADING if options.get(key) not in (None, "auto")
        }
        if device is not None:
            loading.setdefault("device_map", device)
        service = GenerationService(
            pretrained
            if isinstance(pretrained, CoupledForCausalLM)
            else load(pretrained, **loading)
        )
        self.choice: dict[str, Any] = {"specialists": _names(specialists), "strength": strength}
        service.check(GenerationParams(**self.choice))
        if max_length is None and (shortest := service.context_limit()):
            max_length = shortest[1]
        tokenizer = service.model.tokenizer
        with quiet():
            super().__init__(
                service.model,
                backend="causal",
                tokenizer=tokenizer,
                max_length=max_length,
                **options,
            )

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T) tokens -> (B, T, V) logits, as the base class does but for the choice of specialists."""
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, mixed, enabled=mixed is not None):
            return self.model(inps, **self.choice).logits

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._model_generate(context, *args, **kwargs, **self.choice)


def _names(specialists: str | Sequence[str] | None) -> list[str] | None:
    if specialists is None:
        return None
    if isinstance(specialists, str):
        return [] if specialists == "none" else specialists.split("+")
    return list(specialists)
