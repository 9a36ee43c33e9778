"""Scores of a mixture of several models' next-token distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rc_agents.errors import ConfigError
from rc_agents.scoring.causal import outputs_at
from rc_agents.scoring.logits import LogitScorer

Mix = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Maps the models' last states, (P, D_m) each, and log-probabilities, (P, V) each, to logits (P, V)."""


class _Caches:
    """The models' caches, side by side."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self.caches = list(caches)

    def batch_select_indices(self, indices: Tensor) -> None:
        for cache in self.caches:
            cache.batch_select_indices(indices)


class MixtureScorer(LogitScorer):
    """Scores models with one tokenizer by a mixture of their distributions.

    Args:
        models: in eval mode, the anchor first.
        tokenizer: theirs.
        mix: from their states and log-probabilities to logits.
        options: as for `LogitScorer`.

    Raises:
        ConfigError: models with different vocabularies.
    """

    def __init__(self, models: Sequence[Any], tokenizer: Any, mix: Mix, **options: Any) -> None:
        sizes = [model.config.get_text_config(decoder=True).vocab_size for model in models]
        if len(set(sizes)) > 1:
            raise ConfigError(
                f"a mixture of logits needs one vocabulary, these models have {sizes} tokens"
            )
        ended = models[0].generation_config.eos_token_id
        options = {"device": models[0].device, **options}
        super().__init__(tokenizer, eos=ended if isinstance(ended, list) else [ended], **options)
        self.models, self.mix = list(models), mix

    def forward(
        self,
        ids_BT: Tensor,
        mask_BM: Tensor,
        keep_BT: Tensor,
        cache: Any = None,
        *,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any]:
        """Returns mixed logits (P, V) at the positions kept, and the caches."""
        width = ids_BT.shape[1]
        caches = cache.caches if cache is not None else [None] * len(self.models)
        arguments = {
            "input_ids": ids_BT,
            "attention_mask": mask_BM,
            "position_ids": (mask_BM.cumsum(-1) - 1).clamp(min=0)[:, -width:],
            "use_cache": use_cache,
        }
        self.cost.passes += len(self.models)
        self.cost.tokens += len(self.models) * int(mask_BM[:, -width:].sum())
        found = [
            outputs_at(model, keep_BT, arguments | {"past_key_values": one})
            for model, one in zip(self.models, caches, strict=True)
        ]
        states = [state.float() for state, _, _ in found]
        logprobs = [logits.float().log_softmax(-1) for _, logits, _ in found]
        with torch.no_grad():
            mixed = self.mix(states, logprobs)
        return mixed, _Caches([one for _, _, one in found])
