"""The anchor's side of a backward: the others are told once, and their bridges' gradients gathered at its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ModelRunError
from ..execution.rank import Rank
from ..execution.wire import Frame
from ..topology import ANCHOR


class Backwards:
    """Passes that go back.

    Args:
        rank: the anchor's process.
        take: what is done with the gradients of a specialist's bridges, (name, gradients).
    """

    def __init__(self, rank: Rank, take: Callable[[str, Any], None]) -> None:
        self.rank, self.take = rank, take
        self.going: set[int] = set()
        self._thread = 0

    def check_thread(self) -> None:
        """Raises `ModelRunError` where another thread's backward is under way."""
        if self.going and self._thread != threading.get_ident():
            raise ModelRunError(
                "another thread's backward is under way; train an ensemble of several processes in one thread"
            )

    def begin(self, number: int, present: Sequence[str], *, busy: bool) -> None:
        """Tells the others once that a pass goes back, and gathers their bridges' gradients when it is done here.

        Args:
            number: of the pass.
            present: the models that ran in it.
            busy: whether another pass runs now.
        """
        if number in self.going:
            return
        if busy:
            raise ModelRunError(
                "a pass is under way in another thread; train an ensemble of several processes in one thread"
            )
        self.going.add(number)
        self._thread = threading.get_ident()
        others = [name for name in present if name != ANCHOR]
        for name in others:
            self.rank.send(name, Frame("backward", {"pass": number}))

        def gather() -> None:
            for name in others:
                frame = self.rank.wait((name, "grads", number, 0), self.rank.limit(0))
                self.take(name, frame.tensors)
            self.going.discard(number)

        torch.autograd.Variable._execution_engine.queue_callback(gather)
