"""One OS thread a model and a barrier at every site: latency of the slowest model where cores or devices differ."""

from __future__ import annotations

import contextvars
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..backbone import ARRIVE
from .protocol import Meet, Stream, check_order, fail, missed


def run_threads(streams: Sequence[Stream], num_sites: int, meet: Meet) -> dict[str, Any]:
    """Runs every stream in its own thread; after the barrier of a site each applies what its own model hears.

    Grad mode, inference mode and autocast of the caller hold in every thread. Arguments, result and errors as in
    `run_lockstep`.
    """
    if len(streams) == 1:
        return _Pass(streams, num_sites, meet).run_alone()
    return _Pass(streams, num_sites, meet).run()


class _Workers:
    """Threads that stay between passes: as many as passes ever needed at once, so that none waits for another."""

    def __init__(self) -> None:
        self.begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.begin)  # threads do not survive a fork

    def begin(self) -> None:
        self.pool = ThreadPoolExecutor(sys.maxsize, thread_name_prefix="rc_agents")

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Runs the function in an idle thread, or in a new one; in the caller's context."""
        return self.pool.submit(contextvars.copy_context().run, function, *args)


WORKERS = _Workers()


class _Pass:
    """The state of one coupled pass."""

    def __init__(self, streams: Sequence[Stream], num_sites: int, meet: Meet) -> None:
        self.streams = streams
        self.num_sites = num_sites
        self.meet = meet
        self.site = 0
        self.arrived: dict[str, Tensor] = {}
        self.updated: Mapping[str, Tensor] = {}
        self.outputs: dict[str, Any] = {}
        self.failure: tuple[str, BaseException] | None = None
        self.lock = threading.Lock()
        self.state = torch_state()
        self.barrier = threading.Barrier(len(streams), action=self._exchange)

    def run(self) -> dict[str, Any]:
        first, *others = self.streams
        waits = [WORKERS.submit(self._body, stream) for stream in others]
        contextvars.copy_context().run(self._body, first)
        for wait in waits:
            wait.result()
        if self.failure is not None:
            fail(*self.failure)
        return self.outputs

    def run_alone(self) -> dict[str, Any]:
        contextvars.copy_context().run(self._body, self.streams[0])
        if self.failure is not None:
            fail(*self.failure)
        return self.outputs

    def _body(self, stream: Stream) -> None:
        reached = 0

        def arrive(site: int, hidden: Tensor) -> Tensor:
            nonlocal reached
            check_order(stream.name, site, reached)
            reached += 1
            self.arrived[stream.name] = hidden
            self.barrier.wait()
            return self.updated[stream.name]

        ARRIVE.set(arrive)
        try:
            with self.state():
                self.outputs[stream.name] = stream.run()
            if reached != self.num_sites:
                raise missed(stream.name, reached)
        except threading.BrokenBarrierError:
            return
        except BaseException as error:
            self._give_up(stream.name, error)

    def _exchange(self) -> None:
        with self.state():
            self.updated = self.meet(
                self.site, {stream.name: self.arrived[stream.name] for stream in self.streams}
            )
        self.site += 1

    def _give_up(self, name: str, error: BaseException) -> None:
        with self.lock:
            self.failure = self.failure or (name, error)
        self.barrier.abort()


def torch_state() -> Callable[[], ExitStack]:
    """Returns a context that brings the caller's grad, inference and autocast modes into another thread."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds]

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind, dtype in casts:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        return stack

    return enter
