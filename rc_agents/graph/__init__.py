"""Feedforward graphs of frozen models through a shared latent space."""

from ..questions import Question
from .asking import Asked, ask
from .building import build
from .checkpoint import load, outline
from .choosing import Choice, calibrate, choose
from .config import GraphConfig
from .drawing import draw
from .kept import Kept
from .members import answer_probabilities, letter_probabilities
from .model import LatentGraph
from .output import matched_width
from .published import published
from .replay import Replay
from .report import Report, report
from .serving import NodeServer
from .settings import LatentConfig, NodeConfig, OutputConfig
from .signals import GraphOutput, Signals
from .start import ridge_start
from .train import GraphTrainConfig, train

__all__ = [
    "Asked",
    "Choice",
    "GraphConfig",
    "GraphOutput",
    "GraphTrainConfig",
    "Kept",
    "LatentConfig",
    "LatentGraph",
    "NodeConfig",
    "NodeServer",
    "OutputConfig",
    "Question",
    "Replay",
    "Report",
    "Signals",
    "answer_probabilities",
    "ask",
    "build",
    "calibrate",
    "choose",
    "draw",
    "letter_probabilities",
    "load",
    "matched_width",
    "outline",
    "published",
    "report",
    "ridge_start",
    "train",
]
