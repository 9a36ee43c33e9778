"""How a specialist's process makes its links: to the anchor's, and to the specialists that it shares edges with."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

from ..execution.wire import MOST_BODY, Channel, Frame, LinkError, NotYet
from ..topology import ANCHOR
from .handshake import disagreement, greet, next_frame
from .settings import NodeSettings

logger = logging.getLogger(__name__)
Address = tuple[str, int]


class Links:
    """The links of one specialist's process.

    Args:
        name: the specialist.
        settings: deadlines and the secret.
        card: what this process says of itself.

    Attributes:
        peers: name of another specialist -> the number of its connection to the anchor, and the link.
    """

    def __init__(
        self, name: str, settings: NodeSettings, card: Callable[[], dict[str, Any]]
    ) -> None:
        self.name, self.settings, self.card = name, settings, card
        self.epoch = 0
        self.peers: dict[str, tuple[int, Channel]] = {}

    def join(self, anchor: Address, listen: Address, advertise: str | None) -> Channel:
        """Returns the link to the anchor's process, after those to the other specialists have come about.

        Args:
            anchor: where it listens.
            listen: where this process does.
            advertise: host that the others are told, where it is another one.

        Raises:
            NotYet: it may go better a little later; LinkError: refused.
        """
        sock = socket.create_connection(anchor, timeout=self.settings.join)
        try:
            greet(sock, self.settings.secret, self.settings.join)
            host = advertise or listen[0]
            if host in ("0.0.0.0", "::"):
                host = sock.getsockname()[0]
            channel = Channel(sock, ANCHOR, self.settings.deadline)
            channel.send(Frame("hello", self.card() | {"listen": [host, listen[1]]}))
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
        return channel

    def _link(self, name: str, address: Address, epoch: int) -> bool:
        """Makes the link to another specialist's process; returns whether it came about."""
        try:
            sock = socket.create_connection(address, timeout=self.settings.join)
            greet(sock, self.settings.secret, self.settings.join)
            channel = Channel(sock, name, self.settings.deadline)
            channel.send(Frame("hello", self.card() | {"epoch": self.epoch}))
            reply = next_frame(channel, self.settings.join)
        except (OSError, LinkError) as error:
            logger.warning("%s cannot reach %s at %s:%d: %s", self.name, name, *address, error)
            return False
        if reply.kind != "welcome":
            logger.warning("%s refuses %s: %s", name, self.name, reply.fields.get("reason"))
            return False
        self._take(name, epoch, channel)
        return True

    def _take(self, name: str, epoch: int, channel: Channel) -> None:
        """Keeps a link in the place of one that came before."""
        channel.most = MOST_BODY
        old = self.peers.get(name)
        self.peers[name] = (epoch, channel)
        if old is not None:
            old[1].close()

    def welcome(self, channel: Channel, hello: Frame) -> None:
        """Another specialist's process makes its link to this one."""
        wrong = disagreement(self.card(), hello.fields)
        if wrong is not None:
            raise LinkError(wrong)
        if "epoch" not in hello.fields:
            raise LinkError(f"this is the process of {self.name!r}, not the anchor's")
        self._take(str(hello.fields["name"]), int(hello.fields["epoch"]), channel)
        channel.send(Frame("welcome"))  # last, as a pass over this link may begin at once

    def of(self, epochs: dict[str, int]) -> dict[str, Channel]:
        """Returns the links of these connections, as far as they are there."""
        found = {name: self.peers[name] for name in epochs if name in self.peers}
        return {name: link for name, (epoch, link) in found.items() if epoch == epochs[name]}

    def close(self) -> None:
        """Closes the links to the other specialists."""
        peers, self.peers = self.peers, {}
        for _, channel in peers.values():
            channel.close()


def _refusal(name: str, reply: Frame) -> LinkError:
    kind = NotYet if reply.fields.get("again") else LinkError
    return kind(f"the anchor's process refuses {name!r}: {reply.fields.get('reason')}")
