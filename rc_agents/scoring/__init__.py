"""Scores of a model on text: one protocol for the coupled model and for whatever it is compared with."""

from ..execution.ablations import ablated
from .ablation import AblatedScorer
from .causal import CausalScorer
from .logits import LogitScorer
from .mixture import MixtureScorer
from .protocol import Cost, Likelihood, Loss, Scorer

__all__ = [
    "AblatedScorer",
    "CausalScorer",
    "Cost",
    "Likelihood",
    "LogitScorer",
    "Loss",
    "MixtureScorer",
    "Scorer",
    "ablated",
]
