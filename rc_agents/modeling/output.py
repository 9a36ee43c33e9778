"""What a coupled forward returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class CoupledOutput(CausalLMOutputWithPast):
    """A causal LM's output, and with `output_steered=True` every model's own logits under coupling.

    Attributes:
        steered_logits: name -> (B, T_i, V_i).
        steered_input_ids: name -> (B, T_i), the tokens those logits follow, in the model's own vocabulary.
        steered_attention_mask: name -> (B, T_i), 1 for real tokens; rows of a model with its own tokenizer are
            padded on the right.
        lost: name -> why, of models in other processes that took no part in this text; None where all did.
    """

    steered_logits: dict[str, Tensor] | None = None
    steered_input_ids: dict[str, Tensor] | None = None
    steered_attention_mask: dict[str, Tensor] | None = None
    lost: dict[str, str] | None = None
