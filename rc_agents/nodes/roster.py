"""Which specialists' processes are there, as the anchor's process knows them."""

from __future__ import annotations

import itertools
import logging
import select
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cache import CoupledCache
from ..execution.wire import DTYPES, MOST_BODY, Channel, Frame, LinkError, NotYet
from .handshake import disagreement, next_frame

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


class Roster:
    """Lets specialists' processes in, and strikes them off.

    Args:
        names: the ensemble's specialists.
        meet: whether two of them share an edge, and so need a link of their own.
        card: what this process says of itself, once it can.
        join: seconds that a step of the handshake may take.
        dtypes: name -> the dtype of its weights in the checkpoint.

    Attributes:
        links: name -> the number of its connection, and the link.
        cards: what each process said of itself when it came in.
        events: who came and went.
        waited: seconds that the anchor has waited for who is struck off next.
    """

    def __init__(
        self,
        names: Sequence[str],
        meet: Callable[[str, str], bool],
        card: Callable[[], dict[str, Any]],
        join: float,
        dtypes: Mapping[str, str],
    ) -> None:
        self.names, self.meet, self.card, self.join = names, meet, card, join
        self.dtypes = dtypes
        self.links: dict[str, tuple[int, Channel]] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.events: list[Event] = []
        self.waited = 0.0
        self._epochs = itertools.count(1)
        self._addresses: dict[str, tuple[list[Any], int]] = {}
        self._changes = threading.Condition()

    @property
    def connected(self) -> list[str]:
        """The specialists whose processes are there."""
        with self._changes:
            return [name for name in self.names if name in self.links]

    def missing(self, names: Iterable[str], seconds: float) -> list[str]:
        """Returns who of these has not come within so many seconds; at once when all are there."""
        wanted = list(names)
        with self._changes:
            self._changes.wait_for(lambda: self.links.keys() >= set(wanted), seconds)
            return [name for name in wanted if name not in self.links]

    # Coming in.

    def welcome(self, channel: Channel, hello: Frame) -> None:
        """A specialist's process comes in (in a thread of its own)."""
        name = str(hello.fields.get("name"))
        if name not in self.names:
            raise LinkError(
                f"this ensemble has no specialist {name!r}; it has {', '.join(self.names)}"
            )
        wrong = disagreement(self.card(), hello.fields)
        if wrong is not None:
            raise LinkError(wrong)
        self._compare_dtype(name, hello.fields.get("dtype"))
        epoch, peers = self._enter(name, hello)
        try:
            channel.send(Frame("welcome", {"epoch": epoch, "peers": peers}))
            ready = next_frame(channel, self.join)
            unreached = ready.fields["unreached"]
            if unreached:
                raise NotYet(f"it cannot reach {', '.join(unreached)}, with whom it shares edges")
        except Exception:
            with self._changes:
                if self._addresses.get(name, ([], 0))[1] == epoch:
                    del self._addresses[name]
            raise
        channel.most = MOST_BODY
        self._take(name, epoch, channel, hello)
        logger.info("%s has joined", name)

    def _compare_dtype(self, name: str, dtype: Any) -> None:
        """Says where weights are of another dtype than in the checkpoint, which moves every number a little."""
        if dtype not in DTYPES:
            raise LinkError(
                f"it names no dtype of its weights that is known here, got {dtype!r:.40}"
            )
        saved = self.dtypes.get(name)
        if saved is not None and saved != dtype:
            logger.warning(
                "%s has its weights in %s, the checkpoint in %s: answers are not those of one process to the last bit",
                name,
                dtype,
                saved,
            )

    def _enter(self, name: str, hello: Frame) -> tuple[int, dict[str, tuple[list[Any], int]]]:
        """Returns the number of a new connection, and where the processes are that it has to reach."""
        host, port = hello.fields["listen"]
        with self._changes:
            old = self.links.get(name)
            if old is not None and old[1].open and not is_dead(old[1]):
                raise NotYet(f"{name!r} is there already, in another process; stop that one first")
            epoch = next(self._epochs)
            peers = {
                other: place
                for other, place in self._addresses.items()
                if other != name and self.meet(name, other)
            }
            self._addresses[name] = ([str(host), int(port)], epoch)
        return epoch, peers

    def _take(self, name: str, epoch: int, channel: Channel, hello: Frame) -> None:
        with self._changes:
            if name in self.links:
                self.links[name][1].close()
            self.links[name] = (epoch, channel)
            self.cards[name] = dict(hello.fields)
            self.events.append(Event(name, "joined"))
            self._changes.notify_all()

    # Going.

    def living(self, suspects: dict[str, str], position: int) -> dict[str, tuple[int, Channel]]:
        """Strikes off who is gone and who is suspected; returns the links to the others."""
        with self._changes:
            for name in list(self.links):
                if not self.links[name][1].open or is_dead(self.links[name][1]):
                    self._strike(name, "its process is gone", position)
            for name, reason in suspects.items():
                self._strike(name, reason, position)
            return dict(self.links)

    def strike(self, name: str, reason: str, position: int | None = None) -> None:
        """Takes a specialist off the list, and says so."""
        with self._changes:
            self._strike(name, reason, position)

    def strike_if_closed(self, name: str, reason: str) -> None:
        """Takes a specialist off the list where its link is closed."""
        with self._changes:
            link = self.links.get(name)
            if link is not None and not link[1].open:
                self._strike(name, reason)

    def _strike(self, name: str, reason: str, position: int | None = None) -> None:
        link = self.links.pop(name, None)
        if link is None:
            return
        if self._addresses.get(name, ([], 0))[1] == link[0]:  # not that of who is just coming back
            del self._addresses[name]
        link[1].close()
        self.events.append(Event(name, "lost", reason, self.waited, position))
        self.waited = 0.0
        message = f"specialist {name!r} is lost ({reason}); the answer goes on without it"
        logger.warning("%s", message)
        warnings.warn(message, stacklevel=2)

    def clear(self) -> dict[str, tuple[int, Channel]]:
        """Forgets all links, and returns them."""
        with self._changes:
            links, self.links = dict(self.links), {}
        return links


def admit(
    names: Sequence[str], links: dict[str, tuple[int, Channel]], memory: CoupledCache
) -> None:
    """Notes who takes part in a text: whoever is there when it begins, and has been ever since."""
    for name in names:
        if name in memory.lost:
            continue
        epoch = links[name][0] if name in links else None
        if epoch is None:
            memory.lost[name] = "its process is not there"
        elif memory.epochs.setdefault(name, epoch) != epoch:
            memory.lost[name] = "its process is back, without what this text began with"


def is_dead(channel: Channel) -> bool:
    """Whether the other end has closed the link, as far as the kernel knows."""
    poll = select.poll()
    poll.register(channel, select.POLLIN | select.POLLRDHUP)
    return any(
        event & (select.POLLHUP | select.POLLERR | select.POLLRDHUP) for _, event in poll.poll(0)
    )
