"""A function in a process of its own, which holds nothing of this one's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rc_agents.errors import RCError

T = TypeVar("T")


class ProcessDied(RCError, RuntimeError):
    """A process ended before it had its result."""


def apart(work: Callable[..., T], *arguments: Any) -> T:
    """Runs a function in a new process, and returns what it returns or raises what it raises.

    The process is a fork of a server that has imported the function's module and nothing else, so that no model or
    buffer of this process is in it.

    Args:
        work: of a module; with its arguments and its result it is sent by pickle.
        arguments: for it.

    Raises:
        ProcessDied: a signal or an exit ended the process, such as the system's when memory runs out.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise ProcessDied(
                f"the process for {work.__name__} died before it was done; was there memory enough?"
            ) from error
