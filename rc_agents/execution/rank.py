"""One process of an ensemble that runs in several: what it is sent, what it waits for, and what it answers."""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .wire import Channel, Frame, LinkError

Key = tuple[str, str, int, int]
"""Sender, kind, number of the pass or question, site."""

KEPT = frozenset({"state", "output", "done", "grad", "grads", "said"})
"""Kinds that wait in the inbox; all others are acted on when they come."""


class Rank:
    """Frames from and to the other processes; every wait has a deadline.

    Args:
        name: the model that runs here.
        deadline: seconds that a wait may take, whatever the pass.
        deadline_per_token: seconds more for each token of a pass, as long prompts take their time.
    """

    def __init__(self, name: str, deadline: float, deadline_per_token: float) -> None:
        self.name = name
        self.deadline, self.deadline_per_token = deadline, deadline_per_token
        self.channels: dict[str, Channel] = {}
        self.inbox: dict[Key, Frame] = {}
        self.says: Callable[[Tensor], Tensor] | None = None
        self._questions = itertools.count()

    def limit(self, num_tokens: int) -> float:
        """Returns how many seconds a wait in a pass of so many tokens may take."""
        return self.deadline + self.deadline_per_token * num_tokens

    def send(self, to: str, frame: Frame) -> None:
        """Sends a frame; calls `broke` where that link is gone."""
        channel = self.channels.get(to)
        if channel is None:
            self.broke(to, LinkError(f"there is no link to {to!r}"))
            return
        try:
            channel.send(frame)
        except LinkError as error:
            self.broke(to, error)

    def wait(self, key: Key, limit: float, begun: float | None = None) -> Frame:
        """Returns the frame of a key, which is waited for; calls `late` where it does not come in time.

        Args:
            key: of the frame.
            limit: seconds.
            begun: since when, in `time.monotonic()`; now by default.
        """
        begun, noted = time.monotonic() if begun is None else begun, False
        while key not in self.inbox:
            channel = self.channels.get(key[0])
            if channel is None or not channel.open:
                self.broke(key[0], LinkError(f"the link to {key[0]!r} is gone"))
            left = limit - (time.monotonic() - begun)
            if left <= 0:
                self.late(key, limit)
            if not noted and left < limit / 2:
                noted = True
                self.half_way(key)
            self.pump(left if noted else max(0.0, left - limit / 2))
        return self.inbox.pop(key)

    def pump(self, seconds: float | None) -> bool:
        """Takes in what the other processes have sent, waiting at most so long (None: until something comes)."""
        poll = select.poll()
        senders = {}
        for name, channel in list(self.channels.items()):
            if channel.open:
                poll.register(channel, select.POLLIN)
                senders[channel.fileno()] = (name, channel)
        self.watch(poll)
        left = [one for one, (_, channel) in senders.items() if channel.ready]
        timeout = 0.0 if left else None if seconds is None else max(0.0, seconds) * 1000
        ready = dict.fromkeys([*left, *(descriptor for descriptor, _ in poll.poll(timeout))])
        for descriptor in ready:
            if descriptor not in senders:
                self.woken(descriptor)
                continue
            name, channel = senders[descriptor]
            if self.channels.get(name) is not channel:
                continue
            try:
                for frame in channel.frames():
                    self.take(name, frame)
            except LinkError as error:
                self.broke(name, error)
        return bool(ready)

    def take(self, sender: str, frame: Frame) -> None:
        """Files a frame, or acts on it."""
        if frame.kind in KEPT:
            fields = frame.fields
            self.inbox[sender, frame.kind, int(fields["pass"]), int(fields.get("site", 0))] = frame
        elif frame.kind == "say":
            self.answer(sender, frame)
        else:
            self.control(sender, frame)

    def forget(self, before: int) -> None:
        """Drops states of passes before this one."""
        for key in [key for key in self.inbox if key[1] != "said" and key[2] < before]:
            del self.inbox[key]

    # A bridge that reads a prediction asks the source's owner for it, where its gate is open.

    def ask(self, owner: str, states_ND: Tensor) -> Tensor:
        """Returns what another process's model would say behind these states of its own: logits, (N, V)."""
        if torch.is_grad_enabled() and states_ND.requires_grad:
            raise LinkError(
                f"bridges that read the prediction of {owner!r} pass no gradient on between processes; "
                "train them in one process"
            )
        number = next(self._questions)
        self.send(owner, Frame("say", {"pass": number}, {"states": states_ND}))
        frame = self.wait((owner, "said", number, 0), self.limit(len(states_ND)))
        return frame.tensors["logits"]

    @torch.no_grad()
    def answer(self, sender: str, frame: Frame) -> None:
        """Tells another process what the model here would say behind states of its own."""
        if self.says is None:
            raise LinkError(f"{sender!r} asks {self.name!r} for predictions, which no bridge reads")
        logits = self.says(frame.tensors["states"])
        self.send(sender, Frame("said", {"pass": frame.fields["pass"]}, {"logits": logits}))

    # What the two kinds of processes do in their own ways.

    def control(self, sender: str, frame: Frame) -> None:
        """Acts on a frame that nobody waits for."""
        raise NotImplementedError

    def broke(self, name: str, error: LinkError) -> None:
        """A link is gone."""
        raise NotImplementedError

    def late(self, key: Key, limit: float) -> NoReturn:
        """A wait has reached its deadline."""
        raise NotImplementedError

    def half_way(self, key: Key) -> None:
        """Half of a wait's time is over."""

    def backward_begins(self, number: int, present: Sequence[str]) -> None:
        """The first gradient of a pass is on its way."""

    def watch(self, poll: Any) -> None:
        """Registers more to wait for."""

    def woken(self, descriptor: int) -> None:
        """Something else that was waited for is ready."""
