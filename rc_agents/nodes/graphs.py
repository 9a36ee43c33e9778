"""A specialist's side of a backward: what its passes left to go back from."""

from __future__ import annotations

from collections import OrderedDict, deque

import torch
from torch import Tensor

from ..execution.wire import LinkError

GRAPHS = 8  # passes whose graphs wait for their backward


class Graphs:
    """The graphs of the last passes, each for one backward."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, list[Tensor]] = OrderedDict()
        self._spent: deque[int] = deque(maxlen=1024)  # passes whose graphs are gone

    def keep(self, number: int, output: Tensor | None, last: Tensor | None) -> None:
        """Keeps what a pass ended with: the logits that were asked for, and the last state."""
        roots = [one for one in (output, last) if one is not None and one.requires_grad]
        if roots:
            self._held[number] = roots
            while len(self._held) > GRAPHS:
                self._spent.append(self._held.popitem(last=False)[0])

    def backward(self, number: int) -> None:
        """Runs the backward of a pass; raises `LinkError` where its graph is gone."""
        if number in self._spent:
            raise LinkError(
                f"its graph of pass {number} is gone: it keeps those of {GRAPHS} passes, each for one backward"
            )
        roots = self._held.pop(number, [])
        if roots:
            self._spent.append(number)
            # Every gradient comes over a link and is added where the state was shown, so the roots start at zero.
            torch.autograd.backward(roots, [torch.zeros_like(one) for one in roots])

    def drop(self, number: int) -> None:
        """Forgets the graph of a pass that was given up."""
        self._held.pop(number, None)

    def clear(self) -> None:
        """Forgets all."""
        self._held.clear()
        self._spent.clear()
