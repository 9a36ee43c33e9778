"""A specialist's process: loads its model and the bridges into it, joins the anchor, runs its part of every pass."""

from __future__ import annotations

import contextvars
import logging
import random
import select
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from .. import backbone, checkpoint, placement
from ..cache import CoupledCache
from ..errors import ConfigError, RCError, nearest
from ..execution.crossing import OUTPUT, Crossing
from ..execution.exchange import EXCHANGE, keep
from ..execution.protocol import Call
from ..execution.rank import Key, Rank
from ..execution.tree import takes_branches
from ..execution.wire import MOST_BODY, Channel, Frame, LinkError, NotYet
from ..modeling import CoupledForCausalLM
from ..topology import ANCHOR
from .door import Door
from .handshake import PROTOCOL, disagreement, greet, next_frame, versions
from .order import Order, entered
from .settings import NodeSettings, hub_options, listener
from .weights import Weights, told

logger = logging.getLogger(__name__)
GRAPHS = 8  # passes whose graphs wait for their backward


class Aborted(Exception):
    """The anchor has given up the pass that is running."""


class AnchorGone(Exception):
    """The link to the anchor's process is gone."""


class Node(Rank):
    """Serves one specialist of a saved ensemble to the anchor's process.

    Args:
        path: the checkpoint, a folder, a hub id or `package:NAME`; the same as the anchor's.
        name: the specialist that runs here.
        settings: deadlines and the secret.
        listen: host and port (0 for any) where the other specialists' processes reach this one.
        advertise: host that they are told, where it is another one than `listen`'s or the route's.
        options: as for `CoupledForCausalLM.from_pretrained`: device_map, dtype, bases, trust_remote_code and the like.

    Raises:
        ConfigError, CheckpointError: what cannot be loaded or served.
    """

    trains = False

    def __init__(
        self,
        path: str | Path,
        name: str,
        *,
        settings: NodeSettings | None = None,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        advertise: str | None = None,
        **options: Any,
    ) -> None:
        self.settings = settings or NodeSettings()
        super().__init__(name, self.settings.deadline, self.settings.deadline_per_token)
        self.ensemble: CoupledForCausalLM = checkpoint.load(
            CoupledForCausalLM, path, local=name, elsewhere=self, **options
        )
        if name == ANCHOR or name not in self.ensemble.names:
            known = nearest(name, self.ensemble.specialists)
            raise ConfigError(
                f"a node runs one of the ensemble's specialists, got {name!r}; {known}"
            )
        self.model = self.ensemble.models[name]
        if name in told(self.ensemble):
            self.says = backbone.Lens(self.model)
        self.identity = checkpoint.identity(path, **hub_options(options))
        self.tree = name in self.ensemble.config.span_names and takes_branches(self.model)
        self.widths = {
            each: backbone.stream_width(one) for each, one in self.ensemble.models.items()
        }
        self.advertise = advertise
        self.peers: dict[str, tuple[int, Channel]] = {}
        self.epoch = 0
        self.memories: dict[int, CoupledCache] = {}
        self.done: dict[int, int | None] = {}  # the last pass that each memory holds
        self.todo: deque[Frame] = deque()
        self.running = self.given_up = -1
        self.undo: OrderedDict[int, Callable[[], None]] = OrderedDict()
        self.spent: deque[int] = deque(maxlen=1024)  # passes whose graphs are gone
        self.graphs: OrderedDict[int, list[tuple[Tensor, bool]]] = OrderedDict()
        self.weights = Weights(self.ensemble, name)
        self.stopped = threading.Event()
        self.num_passes = 0
        self.door = Door(listener(listen, self.settings.secret), self.settings, self._welcome)

    # Joining.

    def serve(self, anchor: tuple[str, int], *, patience: float = 60.0, once: bool = False) -> None:
        """Joins the anchor's process and serves it; joins anew whenever the link is lost.

        Args:
            anchor: its host and port.
            patience: seconds to go on trying while nobody is there; `math.inf` for ever.
            once: whether to return when the anchor says goodbye.

        Raises:
            LinkError: nobody there for so long, or the anchor refuses this process; the message says why.
        """
        since, pause = time.monotonic(), 0.1
        while not self.stopped.is_set():
            try:
                self._join(anchor)
            except (OSError, NotYet) as error:
                if time.monotonic() - since > patience:
                    raise LinkError(
                        f"{self.name!r} could not join {anchor[0]}:{anchor[1]} for {patience:g} s ({error}); "
                        "start the anchor's process, or name its address"
                    ) from error
                self.stopped.wait(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, 5.0)
                continue
            logger.info("%s serves %s:%d", self.name, *anchor)
            goodbye = False
            try:
                goodbye = self._serve()
            except AnchorGone as error:
                logger.warning("the link to the anchor is gone: %s", error)
            except Exception:  # nothing that comes over a link ends this process
                logger.exception("%s joins anew", self.name)
            finally:
                self._leave()
            if goodbye and once:
                return
            since, pause = time.monotonic(), 0.1

    def stop(self) -> None:
        """Ends `serve` from another thread."""
        self.stopped.set()
        self.door.ring()

    def close(self) -> None:
        """Stops, and lets go of the port."""
        self.stop()
        self.door.close()

    def _join(self, anchor: tuple[str, int]) -> None:
        sock = socket.create_connection(anchor, timeout=self.settings.join)
        try:
            greet(sock, self.settings.secret, self.settings.join)
            host = self.advertise or self.door.address[0]
            if host in ("0.0.0.0", "::"):
                host = sock.getsockname()[0]
            channel = Channel(sock, ANCHOR, self.deadline)
            channel.send(Frame("hello", self.card() | {"listen": [host, self.door.address[1]]}))
            reply = next_frame(channel, self.settings.join)
            if reply.kind == "refused":
                raise _refusal(self.name, reply)
            if reply.kind != "welcome" or "peers" not in reply.fields:
                raise LinkError(f"{anchor[0]}:{anchor[1]} is no anchor's process; name its address")
            self.epoch = int(reply.fields["epoch"])
            unreached = [
                name
                for name, (address, epoch) in reply.fields["peers"].items()
                if not self._link(name, (str(address[0]), int(address[1])), int(epoch))
            ]
            channel.send(Frame("ready", {"unreached": unreached}))
            if unreached:
                raise _refusal(self.name, next_frame(channel, self.settings.join))
        except (LinkError, OSError):
            sock.close()
            raise
        channel.most = MOST_BODY
        self.channels = {ANCHOR: channel}

    def card(self) -> dict[str, Any]:
        """What this process says of itself."""
        return {
            "name": self.name,
            "protocol": PROTOCOL,
            "ensemble": self.identity,
            "versions": versions(),
            "tree": self.tree,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def _link(self, name: str, address: tuple[str, int], epoch: int) -> bool:
        """Makes the link to another specialist's process; returns whether it came about."""
        try:
            sock = socket.create_connection(address, timeout=self.settings.join)
            greet(sock, self.settings.secret, self.settings.join)
            channel = Channel(sock, name, self.deadline)
            channel.send(Frame("hello", self.card() | {"epoch": self.epoch}))
            reply = next_frame(channel, self.settings.join)
        except (OSError, LinkError) as error:
            logger.warning("%s cannot reach %s at %s:%d: %s", self.name, name, *address, error)
            return False
        if reply.kind != "welcome":
            logger.warning("%s refuses %s: %s", name, self.name, reply.fields.get("reason"))
            return False
        self._take_peer(name, epoch, channel)
        return True

    def _take_peer(self, name: str, epoch: int, channel: Channel) -> None:
        """Keeps a link in the place of one that came before."""
        channel.most = MOST_BODY
        old = self.peers.get(name)
        self.peers[name] = (epoch, channel)
        if old is not None:
            old[1].close()

    def _welcome(self, channel: Channel, hello: Frame) -> None:
        """Another specialist's process makes its link to this one."""
        wrong = disagreement(self.card(), hello.fields)
        if wrong is not None:
            raise LinkError(wrong)
        if "epoch" not in hello.fields:
            raise LinkError(f"this is the process of {self.name!r}, not the anchor's")
        self._take_peer(str(hello.fields["name"]), int(hello.fields["epoch"]), channel)
        channel.send(Frame("welcome"))  # last, as a pass over this link may begin at once

    def _leave(self) -> None:
        """Frees everything that belonged to the anchor that is gone."""
        channels, self.channels = self.channels, {}
        peers, self.peers = self.peers, {}
        for channel in [*channels.values(), *(channel for _, channel in peers.values())]:
            channel.close()
        self.inbox.clear()
        self.memories.clear()
        self.done.clear()
        self.graphs.clear()
        self.todo.clear()
        self.undo.clear()
        self.spent.clear()
        self.running = self.given_up = -1

    # Serving.

    def _serve(self) -> bool:
        """Does what the anchor says until it says goodbye (True) or this process is stopped (False)."""
        while not self.stopped.is_set():
            while self.todo:
                frame = self.todo.popleft()
                if frame.kind == "bye":
                    return True
                self._do(frame)
            self.pump(1.0)
        return False

    def _do(self, frame: Frame) -> None:
        number = int(frame.fields.get("pass", -1))
        if frame.kind == "pass":
            self._pass(frame)
        elif frame.kind == "abort":
            for one in [one for one in reversed(self.undo) if one >= int(frame.fields["since"])]:
                self._undo(one)
        elif frame.kind == "backward":
            self._backward(number)
        elif frame.kind == "free":
            for cache in frame.fields["caches"]:
                self.memories.pop(cache, None)
                self.undo.clear()  # which may hold what is to be freed; nothing of before is undone
                self.done.pop(cache, None)
        elif frame.kind == "weights":
            self.weights.take(frame)
        else:
            logger.warning("%s got a frame of unknown kind %r", self.name, frame.kind)

    def _pass(self, frame: Frame) -> None:
        number = int(frame.fields["pass"])
        if number <= self.given_up:
            return  # the anchor has already given it up
        self.running = number
        self.num_passes += 1
        self.forget(number)
        try:
            order = Order.read(frame, self.name)
            self._choose_peers(order)
            with entered(frame.fields["mode"], placement.input_device(self.model)):
                contextvars.copy_context().run(self._run, order, frame)
        except Aborted:
            self._undo(number)
        except _PeerLost as lost:
            self._undo(number)
            fields = {"pass": number, "peer": lost.peer, "reason": str(lost)}
            self.send(ANCHOR, Frame("lost", fields))
        except AnchorGone:
            raise
        except Exception as error:
            self._undo(number)
            logger.exception("%s failed in pass %d", self.name, number)
            reason = f"{type(error).__name__}: {backbone.first_line(error)}"
            self.send(ANCHOR, Frame("failed", {"pass": number, "reason": reason}))
        finally:
            self.running = -1

    def _choose_peers(self, order: Order) -> None:
        """Takes the links of the connections that this pass is run over."""
        anchor = self.channels[ANCHOR]
        self.channels = {ANCHOR: anchor}
        for name, epoch in order.epochs.items():
            known = self.peers.get(name)
            if known is not None and known[0] == epoch:
                self.channels[name] = known[1]

    def _run(self, order: Order, frame: Frame) -> None:
        memory = self._memory(order, frame)
        exchange: Any = keep
        edges = [edge for edge in order.edges if edge.target == self.name]
        if edges:
            exchange = EXCHANGE.get()(
                edges, self.ensemble.bridge, order.strength, order.spans, memory
            )
        crossing = Crossing(
            self,
            order.number,
            order.present,
            order.edges,
            order.num_sites,
            exchange,
            order.limit,
            order.wire,
            order.deaf,
            widths=self.widths,
            own_tokens=frozenset(self.ensemble.config.span_names),
        )
        backbone.OWNER.set(self.ensemble.key)
        backbone.ARRIVE.set(crossing.arrive if order.num_sites else None)
        output = self._call(order, memory).of(self.model)
        if order.num_sites:
            crossing.check_ended()
        shown = None
        if order.output:
            shown = crossing.show(OUTPUT, output.logits, [ANCHOR])
        elif order.answers:
            self.send(ANCHOR, Frame("done", {"pass": order.number}))
        self._keep_graph(order.number, shown, crossing.last)
        if frame.fields["cache"] is not None:
            self.done[frame.fields["cache"]] = order.number

    def _memory(self, order: Order, frame: Frame) -> CoupledCache:
        """Returns the memory that a pass goes on from, brought to where the anchor's is; remembers the way back."""
        number = frame.fields["cache"]
        if number is None:
            memory = CoupledCache({})
        else:
            if number not in self.memories:
                memory = CoupledCache({self.name: self._new_cache(frame.fields)})
                self.memories[number] = memory
            memory = self.memories[number]
            self._check_memory(number, order.after)
            before, after = memory.snapshot(), self.done.get(number)

            def undo() -> None:
                before()
                self.done[number] = after

            self.undo[order.number] = undo
            while next(iter(self.undo)) < order.since:
                self.undo.popitem(last=False)
            for name, argument in frame.fields["operations"]:
                self._operate(memory, name, argument)
        memory.seen[ANCHOR] = order.past
        for sites in memory.histories.values():
            for site, states in sites.items():
                sites[site] = states[:, : order.past]
        return memory

    def _check_memory(self, cache: int, after: int | None) -> None:
        """Raises `LinkError` where a memory is not what the anchor's process takes it for.

        A pass may fail here after the anchor's process has got from it all that it needed.
        """
        if self.done.get(cache) != after:
            raise LinkError(
                f"its memory of this text ends with pass {self.done.get(cache)}, the anchor's with {after}"
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

    def _call(self, order: Order, memory: CoupledCache) -> Call:
        device = placement.input_device(self.model)

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: moved(one) for key, one in value.items()}
            return value.to(device) if isinstance(value, Tensor) else value

        arguments = {key: moved(value) for key, value in order.call.arguments.items()}
        if arguments["use_cache"]:
            arguments[backbone.cache_argument(self.model)] = memory.caches[self.name]
        return Call(arguments, order.call.keep)

    def _undo(self, number: int) -> None:
        """Puts a memory back as it was before a pass."""
        self.graphs.pop(number, None)
        if (undo := self.undo.pop(number, None)) is not None:
            undo()

    # Gradients.

    def _keep_graph(self, number: int, output: Tensor | None, last: Tensor | None) -> None:
        roots = [(one, one is output) for one in (output, last) if one is not None]
        roots = [(one, waits) for one, waits in roots if one.requires_grad]
        if roots:
            self.graphs[number] = roots
            while len(self.graphs) > GRAPHS:
                self.spent.append(self.graphs.popitem(last=False)[0])

    def _backward(self, number: int) -> None:
        """Runs this process's part of a backward: what others owe for the last states comes over the links."""
        if number <= self.given_up:
            return
        self.running = number
        try:
            if number in self.spent:
                raise LinkError(
                    f"its graph of pass {number} is gone: it keeps those of {GRAPHS} passes, each for one backward"
                )
            roots = self.graphs.pop(number, [])
            if roots:
                self.spent.append(number)
                # Every gradient comes over a link and is added where the state was shown, so the roots start at zero.
                outputs = [one for one, _ in roots]
                torch.autograd.backward(outputs, [torch.zeros_like(one) for one in outputs])
            self.send(ANCHOR, self.weights.gradients(number))
        except (Aborted, AnchorGone):
            raise
        except Exception as error:
            logger.warning("%s gave up the backward of pass %d: %s", self.name, number, error)
            reason = f"{type(error).__name__}: {backbone.first_line(error)}"
            fields = {"pass": number, "backward": True, "reason": reason}
            self.send(ANCHOR, Frame("failed", fields))
        finally:
            self.running = -1

    # What comes in.

    def control(self, sender: str, frame: Frame) -> None:
        """Files what the anchor says; gives the running pass up where it says so."""
        if sender != ANCHOR:
            logger.warning("%s got %r from %s", self.name, frame.kind, sender)
            return
        self.todo.append(frame)
        if frame.kind == "abort":
            self.given_up = max(self.given_up, int(frame.fields["pass"]))
            if self.given_up >= self.running >= 0:
                raise Aborted

    def broke(self, name: str, error: LinkError) -> None:
        """Without the anchor everything ends; without another specialist, the pass that needs it."""
        if name == ANCHOR:
            raise AnchorGone(str(error)) from error
        self.channels.pop(name, None)
        if self.running >= 0:
            raise _PeerLost(name, str(error)) from error

    def late(self, key: Key, limit: float) -> NoReturn:
        """Says who did not come."""
        if key[0] == ANCHOR:
            raise AnchorGone(f"it sent nothing for {limit:g} s in the middle of a pass")
        raise _PeerLost(key[0], f"it sent nothing for {limit:g} s")

    def half_way(self, key: Key) -> None:
        """Lets the anchor know for whom this process waits, so that it does not take this one for the culprit."""
        if key[0] != ANCHOR and self.running >= 0:
            self.send(ANCHOR, Frame("waiting", {"pass": self.running, "on": key[0]}))

    def watch(self, poll: Any) -> None:
        """Also wakes when another process has come in, or when this one is stopped."""
        if self.door.bell >= 0:
            poll.register(self.door.bell, select.POLLIN)

    def woken(self, descriptor: int) -> None:
        """Somebody has come in."""
        self.door.heard()

    # What the ensemble asks of where the other models run; a node never runs a whole pass itself.

    def lens(self, name: str) -> Callable[[Tensor], Tensor]:
        """Returns what asks for a model's logits behind states of its own, (N, D) -> (N, V)."""
        return lambda states_ND: self.ask(name, states_ND)

    def takes_branches(self, name: str) -> bool:
        """Only the anchor's process aligns tokens."""
        raise NotImplementedError

    def catch_up(self, name: str, past: int, call: Call) -> None:
        """Only the anchor's process runs passes."""
        raise NotImplementedError

    def run(self, make: Any, memory: CoupledCache) -> Any:
        """Only the anchor's process runs passes."""
        raise RCError("a specialist's process runs its part of a pass when the anchor says so")


def _refusal(name: str, reply: Frame) -> LinkError:
    kind = NotYet if reply.fields.get("again") else LinkError
    return kind(f"the anchor's process refuses {name!r}: {reply.fields.get('reason')}")


class _PeerLost(Exception):
    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(reason)
        self.peer = peer
