"""Bridges into a specialist train in the anchor's process, where the trainer is: values go out, gradients come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..execution.wire import Frame
from ..modeling import CoupledForCausalLM


def told(ensemble: CoupledForCausalLM) -> set[str]:
    """Returns the models whose predictions some bridge reads, and that are therefore asked for them."""
    config = ensemble.config
    return {
        edge.source for edge in ensemble.edges if config.bridge_form(edge).reads == "prediction"
    }


def into(ensemble: CoupledForCausalLM, name: str) -> dict[str, nn.Parameter]:
    """Returns the parameters of the bridges into a model."""
    starts = tuple(f"bridges.{edge.key}." for edge in ensemble.edges if edge.target == name)
    return {
        key: value
        for key, value in ensemble.named_parameters()
        if key.startswith(starts) and starts
    }


class Weights:
    """A specialist's side: it holds the bridges into its model, and trains none unless it is told to.

    Args:
        ensemble: as this process has it.
        name: the model that runs here.
    """

    def __init__(self, ensemble: CoupledForCausalLM, name: str) -> None:
        self.own = into(ensemble, name)
        for value in self.own.values():
            value.requires_grad_(False)

    @torch.no_grad()
    def take(self, frame: Frame) -> None:
        """Takes over the values of a frame, and which of them train."""
        trains = set(frame.fields["trains"])
        for key, value in self.own.items():
            if key in frame.tensors:
                value.copy_(frame.tensors[key])
            value.requires_grad_(key in trains)

    def gradients(self, number: int) -> Frame:
        """Returns the gradients of a pass, which are then zero here."""
        grads: dict[str, Tensor] = {}
        for key, value in self.own.items():
            if value.grad is not None:
                grads[key], value.grad = value.grad, None
        return Frame("grads", {"pass": number}, grads)


class Copies:
    """The anchor's side: copies of the bridges into one specialist, for its trainer.

    Args:
        ensemble: gives it as the anchor's process has it, all bridges in memory.
        name: the specialist.
    """

    def __init__(self, ensemble: Callable[[], CoupledForCausalLM], name: str) -> None:
        self.ensemble, self.name = ensemble, name
        self.sent: dict[str, tuple[int, int]] = {}
        self.pending: tuple[dict[str, tuple[int, int]], list[str]] = ({}, [])
        self.trains: list[str] | None = None
        self.epoch = -1

    def frame(self, epoch: int) -> Frame | None:
        """Returns what has changed since it was last sent over this connection, None where nothing has."""
        if epoch != self.epoch:
            self.sent, self.trains, self.epoch = {}, None, epoch
        own = into(self.ensemble(), self.name)
        trains = [key for key, value in own.items() if value.requires_grad]
        marks = {key: (id(one), one._version) for key, one in own.items()}
        changed = {key: one for key, one in own.items() if self.sent.get(key) != marks[key]}
        if not changed and trains == self.trains:
            return None
        self.pending = marks, trains
        return Frame("weights", {"trains": trains}, {k: v.detach() for k, v in changed.items()})

    def is_sent(self) -> None:
        """What `frame` gave last is on its way."""
        self.sent, self.trains = self.pending

    def forget(self) -> None:
        """What was sent may not have been taken: all of it goes out again with the next pass."""
        self.sent, self.trains = {}, None

    def add(self, grads: Mapping[str, Tensor]) -> None:
        """Adds gradients to the copies'."""
        own = into(self.ensemble(), self.name)
        for key, grad in grads.items():
            value = own[key]
            value.grad = grad.to(value) if value.grad is None else value.grad + grad.to(value)
