"""Who runs when: the same coupled pass under different schedules."""

from .coupled_pass import CoupledPass
from .lockstep import run_lockstep
from .protocol import Meet, Schedule, Stream
from .threads import run_threads

SCHEDULES: dict[str, Schedule] = {"lockstep": run_lockstep, "threads": run_threads}

__all__ = ["SCHEDULES", "CoupledPass", "Meet", "Schedule", "Stream", "run_lockstep", "run_threads"]
