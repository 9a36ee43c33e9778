"""A specialist's process: loads its model and the bridges into it, joins the anchor, runs its part of every pass."""

from __future__ import annotations

import contextvars
import logging
import random
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from .. import backbone, checkpoint, placement
from ..cache import CoupledCache
from ..errors import ConfigError, RCError, nearest
from ..execution.crossing import OUTPUT, Crossing
from ..execution.exchange import EXCHANGE, keep
from ..execution.protocol import Call
from ..execution.rank import Key, Rank
from ..execution.tree import takes_branches
from ..execution.wire import Frame, LinkError, NotYet
from ..modeling import CoupledForCausalLM
from ..topology import ANCHOR
from .door import Door
from .graphs import Graphs
from .handshake import PROTOCOL, versions
from .joining import Links
from .memories import Memories
from .order import Order, entered
from .settings import NodeSettings, hub_options, listener
from .weights import Weights, told

logger = logging.getLogger(__name__)


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
        self.links = Links(name, self.settings, self.card)
        self.memories = Memories(name, self.model)
        self.graphs = Graphs()
        self.todo: deque[Frame] = deque()
        self.running = self.given_up = -1
        self.weights = Weights(self.ensemble, name)
        self.stopped = threading.Event()
        self.num_passes = 0
        self.door = Door(listener(listen, self.settings.secret), self.settings, self.links.welcome)

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
                channel = self.links.join(anchor, self.door.address, self.advertise)
                self.channels = {ANCHOR: channel}
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

    def _leave(self) -> None:
        """Frees everything that belonged to the anchor that is gone."""
        channels, self.channels = self.channels, {}
        for channel in channels.values():
            channel.close()
        self.links.close()
        self.inbox.clear()
        self.memories.clear()
        self.graphs.clear()
        self.todo.clear()
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
            for one in self.memories.passes_since(int(frame.fields["since"])):
                self._undo(one)
        elif frame.kind == "backward":
            self._backward(number)
        elif frame.kind == "free":
            for cache in frame.fields["caches"]:
                self.memories.free(cache)
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
            self.channels = {ANCHOR: self.channels[ANCHOR], **self.links.of(order.epochs)}
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

    def _run(self, order: Order, frame: Frame) -> None:
        memory = self.memories.begin(order, frame)
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
        self.graphs.keep(order.number, shown, crossing.last)
        self.memories.ends_with(frame.fields["cache"], order.number)

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
        """Puts everything back as it was before a pass."""
        self.graphs.drop(number)
        self.memories.undo(number)

    def _backward(self, number: int) -> None:
        """Runs this process's part of a backward: what others owe for the last states comes over the links."""
        if number <= self.given_up:
            return
        self.running = number
        try:
            self.graphs.backward(number)
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


class _PeerLost(Exception):
    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(reason)
        self.peer = peer
