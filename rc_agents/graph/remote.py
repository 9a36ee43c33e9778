"""A node whose model runs in another process, here or on another machine; see `serving` for that side.

Texts go there, or what an encoder is shown, and for a node that hears what it hears, (B, D); what it shows comes back.
Gradients cross the other way, so a graph trains across processes; no weight does.
"""

from __future__ import annotations

import itertools
import socket
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, ModelRunError
from ..execution.wire import MOST_BODY, Channel, Frame, LinkError
from ..nodes.handshake import PROTOCOL, disagreement, greet, next_frame, versions
from ..nodes.settings import NodeSettings
from .frozen import Batch
from .frozen import Hear as Heard
from .latent import Hear
from .latent import Heard as Said
from .settings import NodeConfig

GRAPH = "graph node"  # in the place of an ensemble's identity
TEXTS = "texts"


class RemoteNode:
    """One node, run by a `NodeServer`. Calls from several threads wait for one another.

    Args:
        name: of the node.
        node: where it hears and is read.
        address: host and port of its process.
        settings: deadlines and the secret.

    Raises:
        LinkError: nobody there, or a process that cannot take part; the message says why.
        ConfigError: the process runs the node in another way than the graph says.
    """

    encodes: bool

    def __init__(
        self, name: str, node: NodeConfig, address: tuple[str, int], settings: NodeSettings
    ) -> None:
        self.name, self.node, self.address, self.settings = name, node, address, settings
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        self.channel: Channel | None = None
        self.closed: Any = None
        self.missed = False
        with self.lock:
            self.channel, card = self._connected()
        self.card = card
        self.width, self.encodes = int(card["width"]), bool(card["encodes"])
        self.fingerprint = str(card["fingerprint"])
        self.layer, self.at = int(card["layer"]), int(card["at"])
        self.device = torch.device("cpu")
        self._check(card)

    def _check(self, card: dict[str, Any]) -> None:
        here: dict[str, Any] = {"pooling": self.node.pooling, "hears": bool(self.node.hears)}
        here["layer"] = self.node.block("layer", card["blocks"])
        if self.node.hears:
            here |= {
                "position": self.node.position,
                "at": self.node.block("at", card["blocks"]),
            }
        for what, value in here.items():
            if card.get(what) != value:
                raise ConfigError(
                    f"node {self.name!r} has {what}={value!r} in this graph and {card.get(what)!r} in its process; "
                    "give both the same graph"
                )

    def _connected(self) -> tuple[Channel, dict[str, Any]]:
        """Returns a new link, and what the process says of its node."""
        seconds = self.settings.join
        if self.missed:  # who was silent before is not waited for longer than an answer
            seconds = min(seconds, self.settings.deadline)
        try:
            sock = socket.create_connection(self.address, timeout=seconds)
        except OSError as error:
            raise self._lost(error) from error
        try:
            greet(sock, self.settings.secret, seconds)
            channel = Channel(sock, self.name, self.settings.deadline)
            mine = {"protocol": PROTOCOL, "ensemble": GRAPH, "versions": versions()}
            channel.send(Frame("hello", {"name": self.name, **mine}))
            reply = next_frame(channel, seconds)
            if reply.kind != "welcome":
                raise LinkError(str(reply.fields.get("reason", "it is no node of a graph")))
            wrong = disagreement(mine, reply.fields)
            if wrong is not None:
                raise LinkError(wrong)
        except (LinkError, OSError) as error:
            sock.close()
            raise self._lost(error) from error
        channel.most = MOST_BODY
        self.closed = weakref.finalize(self, channel.close)
        return channel, reply.fields

    def _lost(self, error: Exception) -> LinkError:
        host, port = self.address
        return LinkError(f"node {self.name!r} at {host}:{port} cannot be reached: {error}")

    def states(self, batch: Batch, hear: Heard | None = None) -> tuple[Tensor, Tensor]:
        """Returns what the node's process shows, and which of it is real: pooled (B, 1, D), or whole for attention.

        Args:
            batch: `texts`, as the process reads them in its own tokens; or an encoder's inputs.
            hear: what the graph lets it hear.

        Raises:
            LinkError: the process is gone or silent.
            InputError: a text that its model cannot read.
            ConfigError: `hear` is something else than an edge through the latent space.
        """
        if hear is None:
            return self.read(batch, None, None, normalize=False)
        if not isinstance(hear, Said) or not isinstance(hear.module, Hear):
            raise ConfigError(
                f"node {self.name!r} runs in another process and hears through the latent space alone; for bridges, "
                "kept states and a ridge start run it in this one"
            )
        said, strength = hear.said.cpu(), hear.module.strength().cpu()
        if not torch.is_grad_enabled():  # inside a Function it never is
            said, strength = said.detach(), strength.detach()
        shown: tuple[Tensor, Tensor] = _There.apply(
            said, strength, self, batch, hear.module.normalize
        )
        return shown

    def read(
        self,
        batch: Batch,
        said_BD: Tensor | None,
        strength: Tensor | None,
        *,
        normalize: bool,
        kept: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Asks the process; see `states`. `kept` takes the number of a pass that a backward will ask for."""
        fields: dict[str, Any] = {"grad": kept is not None, "normalize": normalize}
        tensors = {name: one for name, one in batch.items() if isinstance(one, Tensor)}
        fields["others"] = {name: one for name, one in batch.items() if name not in tensors}
        if said_BD is not None and strength is not None:
            tensors |= {"said": said_BD, "strength": strength}
        reply = self._asked(Frame("read", fields, tensors), _size(batch))
        if kept is not None:
            kept.append(int(reply.fields["number"]))
        return reply.tensors["states"], reply.tensors["real"]

    def back(self, number: int, grad: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Returns the gradients of what the node heard (B, D), and of the strength, of an earlier pass."""
        reply = self._asked(Frame("back", {"pass": number}, {"grad": grad}), 2 * size)
        return reply.tensors["said"], reply.tensors["strength"]

    def _asked(self, frame: Frame, size: int) -> Frame:
        """Sends a question and returns its answer; a link that has gone since the last one is made again."""
        with self.lock:
            channel = self._link()
            number = next(self.numbers)
            frame.fields["number"] = number
            try:
                channel.send(frame)
                seconds = self.settings.deadline + self.settings.deadline_per_token * size
                reply = next_frame(channel, seconds)
                if reply.fields.get("number") != number:
                    raise LinkError("it answered another question")
            except LinkError as error:
                self._close()
                self.missed = True
                raise self._lost(error) from error
            except BaseException:  # the answer would be taken for that of the next question
                self._close()
                raise
            self.missed = False
        if reply.kind == "failed":
            kind = InputError if reply.fields.get("input") else ModelRunError
            raise kind(f"node {self.name!r}: {reply.fields['reason']}")
        return reply

    def _link(self) -> Channel:
        """Returns the link, made anew where the other end has closed it."""
        if self.channel is not None:
            try:
                stale = any(True for _ in self.channel.frames())
            except LinkError:
                stale = True
            if stale or not self.channel.open:
                self._close()
        if self.channel is None:
            self.channel, card = self._connected()
            try:
                self._check(card)
                if card["fingerprint"] != self.fingerprint:
                    raise ConfigError(f"node {self.name!r}: another model runs in its process now")
            except ConfigError:
                self._close()
                raise
        return self.channel

    def _close(self) -> None:
        if self.channel is not None and self.closed is not None:
            self.closed.detach()
            self.channel.close()
        self.channel = None

    def close(self) -> None:
        """Ends the link; the next call makes a new one."""
        with self.lock:
            self._close()


class _There(torch.autograd.Function):
    """What a node in another process shows, as a function of what it hears."""

    @staticmethod
    def forward(
        ctx: Any,
        said_BD: Tensor,
        strength: Tensor,
        node: RemoteNode,
        batch: Batch,
        normalize: bool,
    ) -> tuple[Tensor, Tensor]:
        needed = any(ctx.needs_input_grad[:2])
        kept: list[int] | None = [] if needed else None
        states, real = node.read(
            batch, said_BD.detach(), strength.detach(), normalize=normalize, kept=kept
        )
        ctx.node, ctx.kept, ctx.size = node, kept, _size(batch)
        ctx.mark_non_differentiable(real)
        return states, real

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        said, strength = ctx.node.back(ctx.kept[0], grads[0], ctx.size)
        return said, strength, None, None, None


def _size(batch: Batch) -> int:
    """Returns about how many tokens a batch has: 4 characters, or 256 values of an encoder's inputs, are one."""
    texts: Sequence[str] = batch.get(TEXTS, ())
    values = sum(one.numel() for one in batch.values() if isinstance(one, Tensor))
    return sum(map(len, texts)) // 4 + values // 256
