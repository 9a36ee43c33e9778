"""Who runs when: the same coupled pass under different schedules."""

from collections.abc import Callable
from typing import Any

from .coupled_pass import CoupledPass
from .lockstep import run_lockstep
from .protocol import Meet, Stream
from .threads import run_threads

SCHEDULES: dict[str, Callable[..., dict[str, Any]]] = {
    "lockstep": run_lockstep,
    "threads": run_threads,
}

__all__ = ["SCHEDULES", "CoupledPass", "Meet", "Stream", "run_lockstep", "run_threads"]
