"""The anchor's process: its passes, and what happens when a specialist is lost in one."""

from __future__ import annotations

import itertools
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import backbone, checkpoint
from ..cache import CoupledCache, RemoteCache
from ..errors import ConfigError
from ..execution.coupled_pass import CoupledPass
from ..execution.protocol import LOST, Call, Meet, Schedule, Stream
from ..execution.rank import Key, Rank
from ..execution.wire import Frame, LinkError, readable
from ..modeling import CoupledForCausalLM
from ..topology import ANCHOR
from .conducting import Conducted
from .door import Door
from .gradients import Backwards
from .handshake import PROTOCOL, versions
from .order import Order
from .roster import Event, Roster, admit
from .settings import NodeSettings, hub_options, listener
from .trouble import Lost, Running
from .weights import Copies, told


class Hub(Rank):
    """Runs the passes of an ensemble whose specialists are processes of their own.

    A specialist that dies, hangs or is cut off is left out of the text at hand from the token on at which it was lost:
    that pass is run again without it, from caches that are as they were before. It is taken in again, once it is back,
    with the next text.

    Args:
        path: the checkpoint, the same as the specialists'.
        settings: deadlines, wire format and secret.
        listen: host and port (0 for any).
        trains: whether to hold copies of all bridges, so that a trainer here trains them.
        options: as for `CoupledForCausalLM.from_pretrained`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        settings: NodeSettings | None = None,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        trains: bool = False,
        **options: Any,
    ) -> None:
        self.settings = settings or NodeSettings()
        super().__init__(ANCHOR, self.settings.deadline, self.settings.deadline_per_token)
        self.trains = trains
        self.num_passes = 0
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self.running = Running()
        self._backwards = Backwards(self, self._take_gradients)
        self.caught_up = 0
        self._freed: dict[str, list[int]] = {}
        self._known: weakref.WeakSet[RemoteCache] = weakref.WeakSet()
        self._closed = False
        model: CoupledForCausalLM = checkpoint.load(
            CoupledForCausalLM, path, local=ANCHOR, elsewhere=self, **options
        )
        if len(model.routers):
            raise ConfigError(
                "kind='moe' needs every model's state at every router; run this ensemble in one process"
            )
        self._model = weakref.ref(model)  # which holds this hub
        self._made: CoupledForCausalLM | None = model
        self.identity = checkpoint.identity(path, **hub_options(options))
        self.copies = {name: Copies(lambda: self.model, name) for name in model.specialists}
        # The models stay as they are, so what a pass asks of them is found once.
        self.asked = told(model)
        self.widths = {name: backbone.stream_width(one) for name, one in model.models.items()}
        last = dict(zip(model.names, model.sites[-1], strict=True)) if model.sites else {}
        self.end_there = {
            name for name, layer in last.items() if layer == backbone.num_blocks(model.models[name])
        }
        if ANCHOR in self.asked:
            self.says = backbone.Lens(model.models[ANCHOR])
        saved = model.config.dtypes or {}
        self.roster = Roster(model.specialists, self._touch, self._card, self.settings.join, saved)
        self.door = Door(listener(listen, self.settings.secret), self.settings, self.roster.welcome)

    @property
    def model(self) -> CoupledForCausalLM:
        """The ensemble."""
        model = self._model()
        assert model is not None
        return model

    def take_model(self) -> CoupledForCausalLM:
        """Returns the ensemble, once; whoever takes it keeps the hub alive through it."""
        model, self._made = self._made, None
        assert model is not None
        return model

    # Who is there.

    @property
    def connected(self) -> list[str]:
        """The specialists whose processes are there."""
        return self.roster.connected

    @property
    def events(self) -> list[Event]:
        """Who came and went."""
        return self.roster.events

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of each model's weights, of those who are there, the anchor's first."""
        own = {ANCHOR: str(self.model.dtype).removeprefix("torch.")}
        return own | {name: self.roster.cards[name]["dtype"] for name in self.connected}

    def wait_for(self, names: Iterable[str], seconds: float) -> None:
        """Returns when all of these specialists are there; raises `LinkError` that names who is missing in time."""
        missing = self.roster.missing(names, seconds)
        if missing:
            host, port = self.door.address
            raise LinkError(
                f"no process of {', '.join(missing)} came within {seconds:g} s; start: "
                f"rc-agents node --role specialist --name {missing[0]} --connect {host}:{port} CHECKPOINT"
            )

    def _card(self) -> dict[str, Any]:
        return {"protocol": PROTOCOL, "ensemble": self.identity, "versions": versions()}

    def _touch(self, one: str, other: str) -> bool:
        """Whether two specialists share an edge."""
        return any({one, other} == set(edge) for edge in self.model.edges)

    # A pass.

    def run(
        self, make: Callable[[], CoupledPass], memory: CoupledCache
    ) -> tuple[CoupledPass, dict[str, Any]]:
        """Runs a pass; where a specialist is lost in it, once more without it, from where it began."""
        self._backwards.check_thread()
        with self._lock:
            self._backwards.going.clear()
            while True:
                self.running.since, self.caught_up = None, 0
                self._admit(memory)
                restore = memory.snapshot()
                try:
                    step = make()
                    outputs = step.run(self._schedule(step))
                    LOST.set(dict(memory.lost))
                    return step, outputs
                except Lost as lost:
                    self._give_up()
                    restore()
                    self._drop(memory, lost)
                    if torch.is_grad_enabled() and self.trains:
                        raise
                except BaseException:
                    self._give_up()
                    raise

    def _admit(self, memory: CoupledCache) -> None:
        """Finds who takes part in a text, and the links to them."""
        links = self.roster.living(self.running.suspects, memory.length)
        self.running.suspects.clear()
        self.channels = {name: channel for name, (_, channel) in links.items()}
        admit(self.roster.names, links, memory)

    def _schedule(self, step: CoupledPass) -> Schedule:
        def run(streams: Sequence[Stream], num_sites: int, meet: Meet) -> dict[str, Any]:
            return Conducted(self, step, streams, num_sites).run()

        return run

    def begin(self, present: Sequence[str]) -> int:
        """Returns the number of a new pass of these models."""
        number = next(self._numbers)
        self.running.begin(number, present)
        self.num_passes += 1
        self.forget(number - 64)
        return number

    def tell(self, name: str, order: Order) -> None:
        """Sends a model its part of a pass, after what it has to know before."""
        cache = order.cache
        if cache is not None and cache not in self._known:
            self._known.add(cache)
            weakref.finalize(cache, self._freed.setdefault(name, []).append, cache.id)
        self.running.told.add(name)
        freed, ids = self._freed.get(name), []
        while freed:  # to which other threads add
            ids.append(freed.pop())
        if ids:
            self.send(name, Frame("free", {"caches": ids}))
        if self.trains:
            news = self.copies[name].frame(self.roster.links[name][0])
            if news is not None:
                self.send(name, news)
                self.copies[name].is_sent()
        self.send(name, order.frame(name))
        if cache is not None:
            cache.after = order.number

    def catch_up(self, name: str, past: int, call: Call) -> None:
        """Shows one model tokens that it missed, uncoupled; the next frame finds it ready."""
        number = self.begin([name])
        order = Order(
            number=number,
            call=call,
            cache=next((v for v in call.arguments.values() if isinstance(v, RemoteCache)), None),
            past=past,
            num_sites=0,
            present=[name],
            epochs={},
            edges=[],
            limit=self.limit(call.arguments["input_ids"].numel()),
            since=self.running.since or 0,
        )
        self.caught_up += call.arguments["input_ids"].numel()
        self.tell(name, order)

    def lens(self, name: str) -> Callable[[Tensor], Tensor]:
        """Returns what asks for a model's logits behind states of its own, (N, D) -> (N, V)."""
        return lambda states_ND: self.ask(name, states_ND)

    def takes_branches(self, name: str) -> bool:
        """Whether a model can run branch tokens, as its process has found."""
        return bool(self.roster.cards[name]["tree"])

    # Who is lost.

    def _give_up(self) -> None:
        """Ends the pass that is running, everywhere."""
        passes = self.running.give_up()
        for copies in self.copies.values():
            copies.forget()
        if passes is None:
            return
        fields = {"pass": passes[0], "since": passes[1]}
        for name in self.running.told:
            channel = self.channels.get(name)
            if channel is not None and channel.open:
                with suppress(LinkError):
                    channel.send(Frame("abort", fields))

    def _drop(self, memory: CoupledCache, lost: Lost) -> None:
        memory.lost[lost.name] = lost.reason
        self.roster.strike(lost.name, lost.reason, memory.length)
        self.channels.pop(lost.name, None)

    def wait(self, key: Key, limit: float, begun: float | None = None) -> Frame:
        """As `Rank.wait`; remembers how long it took to notice a loss."""
        since = time.monotonic()
        try:
            return super().wait(key, limit, begun)
        except Lost:
            self.roster.waited = time.monotonic() - since
            raise

    def control(self, sender: str, frame: Frame) -> None:
        """Hears of trouble."""
        number = int(frame.fields.get("pass", -1))
        if (
            frame.kind == "failed"
            and frame.fields.get("backward")
            and number in self._backwards.going
        ):
            raise Lost(sender, f"its backward failed: {frame.fields['reason']}")
        self.running.hear(sender, frame)

    def broke(self, name: str, error: LinkError) -> None:
        """A link is gone: of one who takes part in the pass that runs, or of one who does not."""
        busy = self.running.number >= 0 or self._backwards.going
        if busy and name in self.running.present:
            raise Lost(name, str(error)) from error
        self.channels.pop(name, None)
        self.roster.strike_if_closed(name, str(error))

    def late(self, key: Key, limit: float) -> NoReturn:
        """Finds whom everybody waits for."""
        raise Lost(self.running.culprit(key[0]), f"it sent nothing for {limit:.3g} s")

    def watch(self, poll: Any) -> None:
        """Also wakes when somebody has come in, which waits for the next text."""
        if self.door.bell >= 0:
            poll.register(self.door.bell, select.POLLIN)

    def woken(self, descriptor: int) -> None:
        """Somebody has come in."""
        self.door.heard()

    def backward_begins(self, number: int, present: Sequence[str]) -> None:
        """A pass goes back."""
        self._backwards.begin(number, present, busy=self.running.number >= 0)

    def _take_gradients(self, name: str, gradients: dict[str, Tensor]) -> None:
        if self.trains:
            self.copies[name].add(gradients)

    def close(self) -> None:
        """Says goodbye to everybody and stops listening."""
        if self._closed:
            return
        self._closed = True
        self.door.close()
        links = self.roster.clear()
        for _, channel in links.values():
            with suppress(LinkError):
                channel.send(Frame("bye"))
        end = time.monotonic() + 2
        for _, channel in links.values():
            with suppress(LinkError):  # until the other end has read it and closed
                while (left := end - time.monotonic()) > 0:
                    if readable(channel, left):
                        list(channel.frames())
            channel.close()
