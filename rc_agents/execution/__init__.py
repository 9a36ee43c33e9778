"""Who runs when: the same coupled pass under different schedules."""

from ..errors import ConfigError, nearest
from .coupled_pass import CoupledPass
from .lockstep import run_lockstep
from .protocol import LOST, Elsewhere, Meet, Schedule, Stream
from .sleeping import run_sparse
from .threads import run_threads

SCHEDULES: dict[str, Schedule] = {"lockstep": run_lockstep, "threads": run_threads}


def schedule_called(name: str) -> Schedule:
    """Returns the schedule of a name; raises `ConfigError` for an unknown one."""
    if name not in SCHEDULES:
        raise ConfigError(f"unknown schedule {name!r}; {nearest(str(name), SCHEDULES)}")
    return SCHEDULES[name]


__all__ = [
    "LOST",
    "SCHEDULES",
    "CoupledPass",
    "Elsewhere",
    "Meet",
    "Schedule",
    "Stream",
    "run_lockstep",
    "run_sparse",
    "run_threads",
    "schedule_called",
]
