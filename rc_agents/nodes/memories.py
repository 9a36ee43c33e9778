"""A specialist's caches, one for each text of the anchor's, and the way back from every pass that filled them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from ..cache import CoupledCache
from ..execution.wire import Frame, LinkError
from ..topology import ANCHOR
from .order import Order


class Memories:
    """The memories of one model, by the number that the anchor's process knows each by.

    Args:
        name: the model's.
        model: the model.
    """

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model = name, model
        self._held: dict[int, CoupledCache] = {}
        self._done: dict[int, int | None] = {}  # the last pass that each memory holds
        self._undo: OrderedDict[int, Callable[[], None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def begin(self, order: Order, frame: Frame) -> CoupledCache:
        """Returns the memory that a pass goes on from, brought to where the anchor's is; remembers the way back."""
        number = frame.fields["cache"]
        memory = CoupledCache({}) if number is None else self._brought(number, order, frame)
        memory.seen[ANCHOR] = order.past
        for sites in memory.histories.values():
            for site, states in sites.items():
                sites[site] = states[:, : order.past]
        return memory

    def _brought(self, number: int, order: Order, frame: Frame) -> CoupledCache:
        if number not in self._held:
            self._held[number] = CoupledCache({self.name: self._new_cache(frame.fields)})
        memory = self._held[number]
        self._check(number, order.after)
        before, after = memory.snapshot(), self._done.get(number)

        def undo() -> None:
            before()
            self._done[number] = after

        self._undo[order.number] = undo
        while next(iter(self._undo)) < order.since:
            self._undo.popitem(last=False)
        for name, argument in frame.fields["operations"]:
            self._operate(memory, name, argument)
        return memory

    def _check(self, cache: int, after: int | None) -> None:
        """Raises `LinkError` where a memory is not what the anchor's process takes it for.

        A pass may fail here after the anchor's process has got from it all that it needed.
        """
        if self._done.get(cache) != after:
            raise LinkError(
                f"its memory of this text ends with pass {self._done.get(cache)}, the anchor's with {after}"
            )

    def _new_cache(self, fields: dict[str, Any]) -> Any:
        config = self.model.config.get_text_config(decoder=True)
        if fields["plain"]:
            return DynamicCache()
        if fields["capacity"] is None:
            return DynamicCache(config=config)
        return StaticCache(config=config, max_cache_len=fields["capacity"])

    def _operate(self, memory: CoupledCache, name: str, argument: Any) -> None:
        """Does to the cache and to what sources showed what the anchor's process did to its own."""
        cache = memory.caches[self.name]
        if name == "renew":
            memory.renew(self.name, self.model.config)
        elif name == "crop":
            cache.crop(argument)
        elif name in ("select", "reorder"):
            rows: Any = torch.tensor(argument)
            (cache.batch_select_indices if name == "select" else cache.reorder_cache)(rows)
            memory.select_histories(rows)
        elif name == "repeat":
            cache.batch_repeat_interleave(argument)
            if memory.histories:
                num_rows = len(next(iter(next(iter(memory.histories.values())).values())))
                memory.select_histories(torch.arange(num_rows).repeat_interleave(argument))
        elif name == "reset":
            cache.reset()
            memory.histories.clear()
        elif name == "activate_past_recording":
            cache.activate_past_recording()
        else:
            raise LinkError(f"unknown operation {name!r} on a cache")

    def ends_with(self, cache: int | None, number: int) -> None:
        """A memory holds this pass now."""
        if cache is not None:
            self._done[cache] = number

    def undo(self, number: int) -> None:
        """Puts a memory back as it was before a pass."""
        if (undo := self._undo.pop(number, None)) is not None:
            undo()

    def passes_since(self, number: int) -> list[int]:
        """Returns the passes from this one on that can be undone, the last one first."""
        return [one for one in reversed(self._undo) if one >= number]

    def free(self, cache: int) -> None:
        """Forgets a memory."""
        self._held.pop(cache, None)
        self._undo.clear()  # which may hold what is to be freed; nothing of before is undone
        self._done.pop(cache, None)

    def clear(self) -> None:
        """Forgets all."""
        self._held.clear()
        self._done.clear()
        self._undo.clear()
