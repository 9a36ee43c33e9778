"""One pass over all processes, as the anchor's runs it: tells everybody their part, runs its own, gathers the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers import Cache

from .. import backbone
from ..cache import RemoteCache
from ..execution.coupled_pass import CoupledPass
from ..execution.crossing import OUTPUT, Crossing
from ..execution.protocol import NO_LOGITS, Call, Stream, fail
from ..topology import ANCHOR
from .order import Order

if TYPE_CHECKING:
    from .hub import Hub


@dataclass
class Conducted:
    """A pass under way.

    Args:
        hub: the anchor's process.
        step: what is run.
        streams: every model's part of it.
        num_sites: how often the models meet.
    """

    hub: Hub
    step: CoupledPass
    streams: Sequence[Stream]
    num_sites: int

    def __post_init__(self) -> None:
        self.present = [stream.name for stream in self.streams]
        self.remote = [stream for stream in self.streams if stream.name != ANCHOR]
        self.deaf = [stream.name for stream in self.remote if self._is_deaf(stream)]
        self.limit = self.hub.limit(self.step.input_ids.numel() + self.hub.caught_up)

    def run(self) -> dict[str, Any]:
        """Returns what each model's forward returned, of the others their logits where they are wanted."""
        number = self.hub.begin(self.present)
        pending = self._tell_all(number)
        crossing = self._crossing(number)
        outputs: dict[str, Any] = dict.fromkeys(self.present)
        for stream in self.streams:
            if stream.name == ANCHOR:
                outputs[ANCHOR] = _run_here(stream, crossing)
        heard = {}
        for name, kind in pending:
            if kind == "state":
                heard[name] = crossing.hear(name, OUTPUT)
            else:
                self.hub.wait((name, "done", number, 0), self.limit)
        self.hub.running.end(number)
        outputs[ANCHOR].logits, heard = crossing.ended(outputs[ANCHOR].logits, heard)
        return outputs | {name: SimpleNamespace(logits=logits) for name, logits in heard.items()}

    def _tell_all(self, number: int) -> list[tuple[str, str]]:
        """Tells every specialist its part; returns whom this process waits for at the end, and for what."""
        pending = []
        for stream in self.remote:
            order = self._order(stream, number)
            self.hub.tell(stream.name, order)
            if order.output or order.answers:
                pending.append((stream.name, "state" if order.output else "done"))
        return pending

    def _order(self, stream: Stream, number: int) -> Order:
        step, name = self.step, stream.name
        edges = [edge for edge in step.edges if {*edge} <= set(self.present)]
        others = [one for one in self.present if one != ANCHOR]
        return Order(
            number=number,
            call=_call(stream),
            cache=_remote(step.memory.caches.get(name)),
            past=step.past,
            num_sites=self.num_sites,
            present=self.present,
            epochs={one: self.hub.roster.links[one][0] for one in others},
            edges=step.edges,
            strength=step.strengths([edge for edge in step.edges if edge.target == name]),
            spans=step.spans,
            output=not _is_nothing(stream.call),
            answers=ANCHOR in self.hub.asked and (ANCHOR, name) in edges,
            limit=0.9 * self.limit,  # so that it names its culprit before this process names it
            wire=self.hub.settings.wire,
            deaf=self.deaf,
            since=self.hub.running.since or 0,
        )

    def _crossing(self, number: int) -> Crossing:
        return Crossing(
            self.hub,
            number,
            self.present,
            self.step.edges,
            self.num_sites,
            self.step.exchange(ANCHOR),
            self.limit,
            self.hub.settings.wire,
            self.deaf,
            widths=self.hub.widths,
            own_tokens=frozenset(self.hub.model.config.span_names),
        )

    def _is_deaf(self, stream: Stream) -> bool:
        """Whether what a model hears at the last site reaches nothing: it lies behind its last block.

        Its logits are not wanted, and its cache was written before.
        """
        if not _is_nothing(stream.call) or not self.hub.model.sites:
            return False
        if self.hub.model.config.span_names:
            return False  # what was heard is read again with later tokens
        return stream.name in self.hub.end_there


def _run_here(stream: Stream, crossing: Crossing) -> Any:
    token = backbone.ARRIVE.set(crossing.arrive)
    try:
        output = stream.run()
        crossing.check_ended()
        return output
    except Exception as error:
        fail(stream.name, error)
    finally:
        backbone.ARRIVE.reset(token)


def _call(stream: Stream) -> Call:
    assert stream.call is not None
    return stream.call


def _remote(cache: Cache | None) -> RemoteCache | None:
    return cache if isinstance(cache, RemoteCache) else None


def _is_nothing(call: Call | None) -> bool:
    """Whether no position's logits are wanted."""
    return call is not None and call.keep is NO_LOGITS
