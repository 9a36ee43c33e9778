"""Which model goes where: sizes from skeletons, a fair share of every device, what then crosses which link."""

from .machine import Link, Machine
from .plan import Plan, plan, resolved

__all__ = ["Link", "Machine", "Plan", "plan", "resolved"]
