"""The anchor's process: who is there, what each is told of a pass, and what happens when one is lost."""

from __future__ import annotations

import itertools
import logging
import select
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from .. import backbone, checkpoint
from ..cache import CoupledCache, RemoteCache
from ..errors import ConfigError, ModelRunError
from ..execution.coupled_pass import CoupledPass
from ..execution.crossing import OUTPUT, Crossing
from ..execution.protocol import LOST, NO_LOGITS, Call, Meet, Schedule, Stream, fail
from ..execution.rank import Key, Rank
from ..execution.wire import MOST_BODY, Channel, Frame, LinkError, NotYet, readable
from ..modeling import CoupledForCausalLM
from ..topology import ANCHOR
from .door import Door
from .handshake import PROTOCOL, disagreement, next_frame, versions
from .order import Order
from .settings import NodeSettings, hub_options, listener
from .weights import Copies, told

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """What happened to a specialist's process.

    Attributes:
        name: the specialist.
        what: "joined" or "lost".
        reason: why it was lost.
        seconds: how long the anchor had waited when it noticed.
        position: the anchor's columns that the text at hand had when it was lost; the next is without it.
        at: when, in seconds of `time.time()`.
    """

    name: str
    what: str
    reason: str = ""
    seconds: float = 0.0
    position: int | None = None
    at: float = field(default_factory=time.time)


class Lost(ModelRunError):
    """A specialist's process is lost in the middle of a pass."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"specialist {name!r} is lost: {reason}")
        self.name, self.reason = name, reason


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
        self.events: list[Event] = []
        self.cards: dict[str, dict[str, Any]] = {}
        self.num_passes = 0
        self._epochs = itertools.count(1)
        self._numbers = itertools.count()
        self._links: dict[str, tuple[int, Channel]] = {}
        self._addresses: dict[str, tuple[list[Any], int]] = {}
        self._joining = threading.Condition()
        self._lock = threading.RLock()
        self._number = -1
        self._present: Sequence[str] = ()
        self._waits_on: dict[str, str] = {}
        self._backwards: set[int] = set()
        self._goes_back = 0  # the thread that runs a backward
        self._since: int | None = None  # the first pass that a loss undoes
        self._told: set[str] = set()
        self._finished = -1
        self._suspects: dict[str, str] = {}
        self._caught_up = 0
        self._freed: dict[str, list[int]] = {}
        self._known: weakref.WeakSet[RemoteCache] = weakref.WeakSet()
        self._closed = False
        self._waited = 0.0
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
        self._asked = told(model)
        self._widths = {name: backbone.stream_width(one) for name, one in model.models.items()}
        last = dict(zip(model.names, model.sites[-1], strict=True)) if model.sites else {}
        self._end_there = {
            name for name, layer in last.items() if layer == backbone.num_blocks(model.models[name])
        }
        if ANCHOR in self._asked:
            self.says = backbone.Lens(model.models[ANCHOR])
        self.door = Door(listener(listen, self.settings.secret), self.settings, self._welcome)

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
        with self._joining:
            return [name for name in self.copies if name in self._links]

    def wait_for(self, names: Iterable[str], seconds: float) -> None:
        """Returns when all of these specialists are there; raises `LinkError` that names who is missing in time."""
        wanted = list(names)
        with self._joining:
            self._joining.wait_for(lambda: self._links.keys() >= set(wanted), seconds)
            missing = [name for name in wanted if name not in self._links]
        if missing:
            host, port = self.door.address
            raise LinkError(
                f"no process of {', '.join(missing)} came within {seconds:g} s; start: "
                f"rc-agents node --role specialist --name {missing[0]} --connect {host}:{port} CHECKPOINT"
            )

    def _card(self) -> dict[str, Any]:
        return {"protocol": PROTOCOL, "ensemble": self.identity, "versions": versions()}

    def _welcome(self, channel: Channel, hello: Frame) -> None:
        """A specialist's process comes in (in a thread of its own)."""
        name = str(hello.fields.get("name"))
        if name not in self.copies:
            raise LinkError(
                f"this ensemble has no specialist {name!r}; it has {', '.join(self.copies)}"
            )
        wrong = disagreement(self._card(), hello.fields)
        if wrong is not None:
            raise LinkError(wrong)
        host, port = hello.fields["listen"]
        with self._joining:
            old = self._links.get(name)
            if old is not None and old[1].open and not _is_dead(old[1]):
                raise NotYet(f"{name!r} is there already, in another process; stop that one first")
            epoch = next(self._epochs)
            peers = {
                other: place
                for other, place in self._addresses.items()
                if other != name and self._touch(name, other)
            }
            self._addresses[name] = ([str(host), int(port)], epoch)
        try:
            channel.send(Frame("welcome", {"epoch": epoch, "peers": peers}))
            ready = next_frame(channel, self.settings.join)
            unreached = ready.fields["unreached"]
            if unreached:
                raise NotYet(f"it cannot reach {', '.join(unreached)}, with whom it shares edges")
        except Exception:
            with self._joining:
                if self._addresses.get(name, ([], 0))[1] == epoch:
                    del self._addresses[name]
            raise
        channel.most = MOST_BODY
        with self._joining:
            if name in self._links:
                self._links[name][1].close()
            self._links[name] = (epoch, channel)
            self.cards[name] = dict(hello.fields)
            self.events.append(Event(name, "joined"))
            self._joining.notify_all()
        logger.info("%s has joined", name)

    def _touch(self, one: str, other: str) -> bool:
        """Whether two specialists share an edge."""
        return any({one, other} == set(edge) for edge in self.model.edges)

    # A pass.

    def run(
        self, make: Callable[[], CoupledPass], memory: CoupledCache
    ) -> tuple[CoupledPass, dict[str, Any]]:
        """Runs a pass; where a specialist is lost in it, once more without it, from where it began."""
        if self._backwards and self._goes_back != threading.get_ident():
            raise ModelRunError(
                "another thread's backward is under way; train an ensemble of several processes in one thread"
            )
        with self._lock:
            self._backwards.clear()
            while True:
                self._since, self._caught_up = None, 0
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
        """Finds who takes part in a text: whoever is there when it begins, and has been ever since."""
        with self._joining:
            for name in list(self._links):
                if not self._links[name][1].open or _is_dead(self._links[name][1]):
                    self._unlink(name, "its process is gone", memory.length)
            for name, reason in self._suspects.items():
                self._unlink(name, reason, memory.length)
            self._suspects.clear()
            links = dict(self._links)
        self.channels = {name: channel for name, (_, channel) in links.items()}
        for name in self.copies:
            if name in memory.lost:
                continue
            epoch = links[name][0] if name in links else None
            if epoch is None:
                memory.lost[name] = "its process is not there"
            elif memory.epochs.setdefault(name, epoch) != epoch:
                memory.lost[name] = "its process is back, without what this text began with"

    def _schedule(self, step: CoupledPass) -> Schedule:
        def run(streams: Sequence[Stream], num_sites: int, meet: Meet) -> dict[str, Any]:
            return self._run(step, streams, num_sites)

        return run

    def _run(self, step: CoupledPass, streams: Sequence[Stream], num_sites: int) -> dict[str, Any]:
        """Tells everybody their part, runs the anchor, and gathers the logits that are wanted."""
        present = [stream.name for stream in streams]
        limit = self.limit(step.input_ids.numel() + self._caught_up)
        number = self._begin(present)
        edges = [edge for edge in step.edges if {*edge} <= set(present)]
        remote = [stream for stream in streams if stream.name != ANCHOR]
        pending = []
        deaf = [stream.name for stream in remote if self._is_deaf(stream)]
        for stream in remote:
            wanted = not _is_nothing(stream.call)
            order = Order(
                number=number,
                call=_call(stream),
                cache=_remote(step.memory.caches.get(stream.name)),
                past=step.past,
                num_sites=num_sites,
                present=present,
                epochs={name: self._links[name][0] for name in present if name != ANCHOR},
                edges=step.edges,
                strength=step.strengths([e for e in step.edges if e.target == stream.name]),
                spans=step.spans,
                output=wanted,
                answers=ANCHOR in self._asked and (ANCHOR, stream.name) in edges,
                limit=0.9 * limit,  # so that it names its culprit before this process names it
                wire=self.settings.wire,
                deaf=deaf,
                since=self._since or 0,
            )
            self._tell(stream.name, order)
            if order.output or order.answers:
                pending.append((stream.name, "state" if order.output else "done"))
        crossing = Crossing(
            self,
            number,
            present,
            step.edges,
            num_sites,
            step.exchange(ANCHOR),
            limit,
            self.settings.wire,
            deaf,
            widths=self._widths,
            own_tokens=frozenset(self.model.config.span_names),
        )
        outputs: dict[str, Any] = dict.fromkeys(present)
        for stream in streams:
            if stream.name == ANCHOR:
                outputs[ANCHOR] = self._run_anchor(stream, crossing)
        heard = {}
        for name, kind in pending:
            if kind == "state":
                heard[name] = crossing.hear(name, OUTPUT)
            else:
                self.wait((name, "done", number, 0), limit)
        self._number, self._finished = -1, number
        outputs[ANCHOR].logits, heard = crossing.ended(outputs[ANCHOR].logits, heard)
        outputs |= {name: SimpleNamespace(logits=logits) for name, logits in heard.items()}
        return outputs

    def _is_deaf(self, stream: Stream) -> bool:
        """Whether what a model hears at the last site reaches nothing: it lies behind its last block.

        Its logits are not wanted, and its cache was written before.
        """
        if not _is_nothing(stream.call) or not self.model.sites:
            return False
        if self.model.config.span_names:
            return False  # what was heard is read again with later tokens
        return stream.name in self._end_there

    def _run_anchor(self, stream: Stream, crossing: Crossing) -> Any:
        token = backbone.ARRIVE.set(crossing.arrive)
        try:
            output = stream.run()
            crossing.check_ended()
            return output
        except Exception as error:
            fail(stream.name, error)
        finally:
            backbone.ARRIVE.reset(token)

    def _begin(self, present: Sequence[str]) -> int:
        self._number = next(self._numbers)
        if self._since is None:
            self._since, self._told = self._number, set()
        self.num_passes += 1
        self._present = [name for name in present if name != ANCHOR]
        self._waits_on = {}
        self.forget(self._number - 64)
        return self._number

    def _tell(self, name: str, order: Order) -> None:
        """Sends a model its part of a pass, after what it has to know before."""
        cache = order.cache
        if cache is not None and cache not in self._known:
            self._known.add(cache)
            weakref.finalize(cache, self._freed.setdefault(name, []).append, cache.id)
        self._told.add(name)
        freed, ids = self._freed.get(name), []
        while freed:  # to which other threads add
            ids.append(freed.pop())
        if ids:
            self.send(name, Frame("free", {"caches": ids}))
        if self.trains:
            news = self.copies[name].frame(self._links[name][0])
            if news is not None:
                self.send(name, news)
                self.copies[name].is_sent()
        self.send(name, order.frame(name))
        if cache is not None:
            cache.after = order.number

    def catch_up(self, name: str, past: int, call: Call) -> None:
        """Shows one model tokens that it missed, uncoupled; the next frame finds it ready."""
        number = self._begin([name])
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
            since=self._since or 0,
        )
        self._caught_up += call.arguments["input_ids"].numel()
        self._tell(name, order)

    def lens(self, name: str) -> Callable[[Tensor], Tensor]:
        """Returns what asks for a model's logits behind states of its own, (N, D) -> (N, V)."""
        return lambda states_ND: self.ask(name, states_ND)

    def takes_branches(self, name: str) -> bool:
        """Whether a model can run branch tokens, as its process has found."""
        return bool(self.cards[name]["tree"])

    # Who is lost.

    def _give_up(self) -> None:
        """Ends the pass that is running, everywhere."""
        number, since = self._number, self._since
        self._number, self._since = -1, None
        for copies in self.copies.values():
            copies.forget()
        if since is None:
            return
        fields = {"pass": max(number, since), "since": since}
        for name in self._told:
            channel = self.channels.get(name)
            if channel is not None and channel.open:
                with suppress(LinkError):
                    channel.send(Frame("abort", fields))

    def _drop(self, memory: CoupledCache, lost: Lost) -> None:
        memory.lost[lost.name] = lost.reason
        with self._joining:
            self._unlink(lost.name, lost.reason, memory.length)
        self.channels.pop(lost.name, None)

    def _unlink(self, name: str, reason: str, position: int | None = None) -> None:
        """Takes a specialist off the list, and says so."""
        link = self._links.pop(name, None)
        if link is None:
            return
        if self._addresses.get(name, ([], 0))[1] == link[0]:  # not that of who is just coming back
            del self._addresses[name]
        link[1].close()
        self.events.append(Event(name, "lost", reason, self._waited, position))
        self._waited = 0.0
        message = f"specialist {name!r} is lost ({reason}); the answer goes on without it"
        logger.warning("%s", message)
        warnings.warn(message, stacklevel=2)

    def wait(self, key: Key, limit: float, begun: float | None = None) -> Frame:
        """As `Rank.wait`; remembers how long it took to notice a loss."""
        since = time.monotonic()
        try:
            return super().wait(key, limit, begun)
        except Lost:
            self._waited = time.monotonic() - since
            raise

    def control(self, sender: str, frame: Frame) -> None:
        """Hears of trouble."""
        number = int(frame.fields.get("pass", -1))
        if frame.kind == "failed" and frame.fields.get("backward") and number in self._backwards:
            raise Lost(sender, f"its backward failed: {frame.fields['reason']}")
        if frame.kind == "lost" and number == self._finished:  # this process needed it no more
            peer = str(frame.fields["peer"])
            self._suspects[peer] = f"{sender} lost it: {frame.fields['reason']}"
        if number != self._number or number < 0:
            return
        if frame.kind == "waiting":
            self._waits_on[sender] = str(frame.fields["on"])
        elif frame.kind == "failed":
            raise Lost(sender, f"it failed: {frame.fields['reason']}")
        elif frame.kind == "lost":
            peer = self._culprit(str(frame.fields["peer"]))
            if peer not in self._present:
                raise Lost(sender, f"it lost {peer!r}, who takes no part: {frame.fields['reason']}")
            raise Lost(peer, f"{sender} lost it: {frame.fields['reason']}")
        else:
            logger.warning("a frame of unknown kind %r from %s", frame.kind, sender)

    def broke(self, name: str, error: LinkError) -> None:
        """A link is gone: of one who takes part in the pass that runs, or of one who does not."""
        if (self._number >= 0 or self._backwards) and name in self._present:
            raise Lost(name, str(error)) from error
        self.channels.pop(name, None)
        with self._joining:
            link = self._links.get(name)
            if link is not None and not link[1].open:
                self._unlink(name, str(error))

    def late(self, key: Key, limit: float) -> NoReturn:
        """Finds whom everybody waits for."""
        raise Lost(self._culprit(key[0]), f"it sent nothing for {limit:.3g} s")

    def _culprit(self, name: str) -> str:
        """Returns for whom a specialist waits in the end, itself where it waits for nobody."""
        culprit, seen = name, set()
        while culprit in self._waits_on and culprit not in seen:
            seen.add(culprit)
            culprit = self._waits_on[culprit]
        return name if culprit == ANCHOR else culprit

    def watch(self, poll: Any) -> None:
        """Also wakes when somebody has come in, which waits for the next text."""
        if self.door.bell >= 0:
            poll.register(self.door.bell, select.POLLIN)

    def woken(self, descriptor: int) -> None:
        """Somebody has come in."""
        self.door.heard()

    # Gradients.

    def backward_begins(self, number: int, present: Sequence[str]) -> None:
        """Tells the others once that a pass goes back, and gathers their bridges' gradients when it is done here."""
        if number in self._backwards:
            return
        if self._number >= 0:
            raise ModelRunError(
                "a pass is under way in another thread; train an ensemble of several processes in one thread"
            )
        self._backwards.add(number)
        self._goes_back = threading.get_ident()
        others = [name for name in present if name != ANCHOR]
        for name in others:
            self.send(name, Frame("backward", {"pass": number}))

        def gather() -> None:
            for name in others:
                frame = self.wait((name, "grads", number, 0), self.limit(0))
                if self.trains:
                    self.copies[name].add(frame.tensors)
            self._backwards.discard(number)

        torch.autograd.Variable._execution_engine.queue_callback(gather)

    def close(self) -> None:
        """Says goodbye to everybody and stops listening."""
        if self._closed:
            return
        self._closed = True
        self.door.close()
        with self._joining:
            links, self._links = dict(self._links), {}
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


def _call(stream: Stream) -> Call:
    assert stream.call is not None
    return stream.call


def _remote(cache: Cache | None) -> RemoteCache | None:
    return cache if isinstance(cache, RemoteCache) else None


def _is_nothing(call: Call | None) -> bool:
    """Whether no position's logits are wanted."""
    return call is not None and call.keep is NO_LOGITS


def _is_dead(channel: Channel) -> bool:
    """Whether the other end has closed the link, as far as the kernel knows."""
    poll = select.poll()
    poll.register(channel, select.POLLIN | select.POLLRDHUP)
    return any(
        event & (select.POLLHUP | select.POLLERR | select.POLLRDHUP) for _, event in poll.poll(0)
    )
