"""What is compared, one file a method: each is fitted to a setting and a seed and answers the `Scorer` protocol."""

from .bench import Bench, Fitted, Method, NotApplicable
from .registry import METHODS, NAMES, method

__all__ = ["METHODS", "NAMES", "Bench", "Fitted", "Method", "NotApplicable", "method"]
