"""How much memory a piece of work needs at most, where Linux tells."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLEAR = Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes of memory that this process has now, and forgets the peak so far, where Linux allows it."""
    CLEAR.write_text("5")
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def high_water() -> int:
    """Bytes of memory that this process had at most since `resident`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def give_back() -> None:
    """Returns freed memory to the system, which glibc else keeps for the next model: it would count as in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def peak() -> Iterator[dict[str, int]]:
    """Fills in `peak_bytes`, of the whole process during the block; nothing where the system does not tell."""
    found: dict[str, int] = {}
    try:
        resident()
    except OSError:
        yield found
        return
    yield found
    found["peak_bytes"] = high_water()
