"""The process of one node: it holds that node's frozen model alone, and shows what it reads to whoever runs the graph.

It answers one question after another, of as many graphs as connect to it, and keeps nothing between them but the last
passes that a backward may ask for.
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backbone
from ..assembly import Loader
from ..backbone import first_line
from ..checkpoint.identity import fingerprint
from ..errors import ConfigError, InputError, TokenError, nearest
from ..execution.wire import MOST_BODY, Channel, Frame, LinkError
from ..nodes.door import Door
from ..nodes.handshake import PROTOCOL, disagreement, versions
from ..nodes.settings import NodeSettings, listener
from . import pooling
from .checkpoint import config_of
from .config import GraphConfig
from .frozen import frozen_node
from .latent import added
from .reading import tokenize
from .remote import GRAPH, TEXTS

logger = logging.getLogger(__name__)
PASSES = 8  # that wait for their backward
LOOK = 0.5  # seconds between looks at whether to stop


class NodeServer:
    """Runs one node of a graph for others.

    Args:
        graph: the graph, as data, as a file of YAML or a saved one.
        name: the node that runs here.
        listen: host and port (0 for any); beyond loopback needs a secret.
        settings: seconds and the secret.
        options: `device_map`, `dtype`, `quantization`, `trust_remote_code`, as for `rc_agents.graph.build`.

    Raises:
        ConfigError, ModelError: what cannot be loaded or served.
    """

    def __init__(
        self,
        graph: GraphConfig | Mapping[str, Any] | str | Path,
        name: str,
        *,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        settings: NodeSettings | None = None,
        **options: Any,
    ) -> None:
        config = config_of(graph)
        if name not in config.nodes:
            raise ConfigError(f"the graph has no node {name!r}; {nearest(name, config.nodes)}")
        node, self.settings = config.nodes[name], settings or NodeSettings()
        self.member = Loader([name], **options).add(name, node.model)
        self.node = frozen_node(name, self.member.model, node)
        self.channels: list[Channel] = []
        self.held: dict[int, OrderedDict[int, tuple[Tensor, Tensor, Tensor]]] = {}
        self.stopped = threading.Event()
        self.card = self._card()
        self.door = Door(listener(listen, self.settings.secret), self.settings, self._welcome)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self.door.address

    def _card(self) -> dict[str, Any]:
        node = self.node.node
        return {
            "protocol": PROTOCOL,
            "ensemble": GRAPH,
            "versions": versions(),
            "width": self.node.width,
            "blocks": backbone.num_blocks(self.node.model),
            "encodes": self.member.encodes,
            "fingerprint": fingerprint(self.member),
            "model": self.member.ref.to_dict(),
            "layer": self.node.layer,
            "at": self.node.at,
            "position": node.position,
            "pooling": node.pooling,
            "hears": bool(node.hears),
        }

    def _welcome(self, channel: Channel, hello: Frame) -> None:
        wrong = disagreement(self.card, hello.fields)
        if wrong is not None:
            raise LinkError(wrong)
        if hello.fields.get("name") != self.node.name:
            raise LinkError(f"node {self.node.name!r} runs here, not {hello.fields.get('name')!r}")
        channel.most = MOST_BODY
        self.channels.append(channel)
        channel.send(Frame("welcome", self.card))

    # Answering.

    def serve(self) -> None:
        """Answers until `close` is called."""
        while not self.stopped.is_set():
            poll = select.poll()
            for file in (self.door.bell, *(one.fileno() for one in self.channels)):
                if file >= 0:
                    poll.register(file, select.POLLIN)
            poll.poll(LOOK * 1000)
            self.door.heard()
            for channel in list(self.channels):
                try:
                    for frame in channel.frames():
                        channel.send(self._answer(channel, frame))
                except (LinkError, OSError, KeyError, TypeError, ValueError) as error:
                    logger.info("a graph has left %s: %s", self.node.name, error)
                    self._drop(channel)

    def _drop(self, channel: Channel) -> None:
        self.channels.remove(channel)
        channel.close()
        self.held.pop(id(channel), None)

    def _answer(self, channel: Channel, frame: Frame) -> Frame:
        number = frame.fields["number"]
        try:
            tensors = (
                self._back(channel, frame) if frame.kind == "back" else self._read(channel, frame)
            )
        except LinkError:
            raise
        except (
            Exception
        ) as error:  # whatever a question does to the model, the next one is answered
            logger.warning("%s could not answer: %s", self.node.name, error)
            known = isinstance(error, (InputError, TokenError))
            return Frame("failed", {"number": number, "reason": first_line(error), "input": known})
        return Frame("shown", {"number": number}, tensors)

    def _read(self, channel: Channel, frame: Frame) -> dict[str, Tensor]:
        tensors = dict(frame.tensors)
        said, strength = tensors.pop("said", None), tensors.pop("strength", None)
        grad, normalize = bool(frame.fields["grad"]), bool(frame.fields["normalize"])
        with torch.set_grad_enabled(grad):
            if said is None or strength is None:
                hear = None
            else:
                leaves = [one.requires_grad_(grad) for one in (said, strength)]

                def hear(heard_BTD: Tensor) -> Tensor:
                    return added(*leaves, heard_BTD, normalize=normalize)

            batch = self._batch(tensors, frame.fields["others"])
            states, real = self._condensed(*self.node.states(batch, hear))
        if grad and said is not None and strength is not None:
            held = self.held.setdefault(id(channel), OrderedDict())
            held[frame.fields["number"]] = (states, said, strength)
            while len(held) > PASSES:
                held.popitem(last=False)
        return {"states": states, "real": real}

    def _batch(self, tensors: dict[str, Tensor], others: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.member.encodes:
            return {**tensors, **others}
        return tokenize(self.node.name, self.member.tokenizer, others[TEXTS], self.node.context)

    def _condensed(self, states_BTD: Tensor, real_BT: Tensor) -> tuple[Tensor, Tensor]:
        """All that the graph's pooling needs, which learned attention does not do here."""
        kind, real_BT = self.node.node.pooling, real_BT.to(states_BTD.device)
        if kind == "attention":
            return states_BTD, real_BT
        pool = pooling.last if kind == "last" else pooling.mean
        pooled_B1D = pool(states_BTD, real_BT).float()[:, None]
        return pooled_B1D, torch.ones(pooled_B1D.shape[:2], dtype=torch.long)

    def _back(self, channel: Channel, frame: Frame) -> dict[str, Tensor]:
        held = self.held.get(id(channel), OrderedDict()).pop(frame.fields["pass"], None)
        if held is None:
            raise RuntimeError(
                f"its pass {frame.fields['pass']} is gone: it keeps the last {PASSES} of a link for one backward each"
            )
        states, said, strength = held
        grads = torch.autograd.grad(
            states, (said, strength), frame.tensors["grad"].to(states.device, states.dtype)
        )
        return dict(zip(("said", "strength"), grads, strict=True))

    def close(self) -> None:
        """Stops, and ends all links."""
        self.stopped.set()
        self.door.ring()
        self.door.close()
        for channel in list(self.channels):
            with contextlib.suppress(OSError):
                channel.close()
