"""N frozen causal language models that behave as one: the Hugging Face model of the ensemble."""

from .couple import couple
from .coupled import CoupledForCausalLM
from .output import CoupledOutput

__all__ = ["CoupledForCausalLM", "CoupledOutput", "couple"]
