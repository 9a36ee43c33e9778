"""Runs one frozen node over texts: what it hears is added behind one block, and it is read behind another.

The model's own `forward` runs, tapped as in a coupled pass. Shapes: B texts, T tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import backbone
from ..errors import ConfigError
from ..execution.protocol import NO_LOGITS, Call
from ..placement import execution_device, input_device
from .pooling import last_places
from .settings import NodeConfig

Batch = Mapping[str, Any]
"""`input_ids` and `attention_mask`, (B, T), padded on the left; or an encoder's own inputs of B rows."""
Hear = Callable[[Tensor], Tensor]
"""The states that hear (B, T, D) -> what is added to them."""

_KEYS = itertools.count(1 << 32)  # apart from the ensembles' keys


class _Seen(Exception):
    """The states were read; what lies above them is not needed."""


class FrozenNode:
    """A frozen model with taps where its node hears, is read and, as a voice, speaks.

    Args:
        name: of the node.
        model: its model.
        node: where it hears and is read.

    Raises:
        ConfigError: it would be read before it hears.
    """

    encodes = False

    def __init__(self, name: str, model: PreTrainedModel, node: NodeConfig) -> None:
        self.name, self.model, self.node = name, model, node
        blocks = backbone.num_blocks(model)
        try:
            self.at, self.layer = node.block("at", blocks), node.block("layer", blocks)
        except ConfigError as error:
            raise ConfigError(f"node {name!r}: {error}") from None
        if node.hears and self.at >= self.layer:
            raise ConfigError(
                f"node {name!r} hears behind block {self.at} and is read behind block {self.layer} of {blocks}: it "
                "must hear before it is read, so that its own blocks answer what it heard"
            )
        self.key = next(_KEYS)
        self.handles = backbone.tap(model, (self.at, self.layer, blocks), self.key)

    @property
    def width(self) -> int:
        """Of its stream."""
        return backbone.stream_width(self.model)

    @property
    def device(self) -> torch.device:
        """Where its tokens go."""
        return input_device(self.model)

    @property
    def context(self) -> int | None:
        """The tokens that its model was made for; None where it has no limit."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Returns what the model's forward is called with."""
        placed: dict[str, Any] = {name: batch[name].to(self.device) for name in batch}
        if "position_ids" in backbone.accepted_arguments(self.model):
            placed["position_ids"] = (placed["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return placed | {"use_cache": False}

    def states(self, batch: Batch, hear: Hear | None = None) -> tuple[Tensor, Tensor]:
        """Returns the states behind `layer`, (B, T, D), and which are real, (B, T); blocks above do not run."""
        seen: list[Tensor] = []

        def show(states_BTD: Tensor) -> Tensor:
            seen.append(states_BTD)
            raise _Seen

        with self.tapped(self.hearing(batch["attention_mask"], hear), show), suppress(_Seen):
            Call(self.arguments(batch), NO_LOGITS).of(self.model)
        return seen[0], batch["attention_mask"]

    def hearing(self, mask_BT: Tensor, hear: Hear | None) -> Hear | None:
        """Returns what happens where the node hears: its states, with what was heard at the position it hears at."""
        if hear is None:
            return None

        def heard(states_BTD: Tensor) -> Tensor:
            if self.node.position == "all":
                return states_BTD + hear(states_BTD)
            width = states_BTD.shape[1]
            places_B = last_places(mask_BT[:, -width:]).to(states_BTD.device)
            chosen_BT1 = (
                torch.arange(width, device=places_B.device)[None, :, None]
                == places_B[:, None, None]
            )
            rows = torch.arange(len(places_B), device=places_B.device)
            added_B1D = hear(states_BTD[rows, places_B][:, None])
            return states_BTD + torch.where(chosen_BT1, added_B1D, torch.zeros_like(added_B1D))

        return heard

    @contextmanager
    def tapped(self, *does: Hear | None) -> Iterator[None]:
        """While inside, what happens where the node hears, is read and speaks; None lets the states through."""

        def arrive(site: int, hidden: Tensor) -> Tensor:
            act = does[site] if site < len(does) else None
            return hidden if act is None else act(hidden)

        tokens = backbone.ARRIVE.set(arrive), backbone.OWNER.set(self.key)
        try:
            yield
        finally:
            backbone.ARRIVE.reset(tokens[0])
            backbone.OWNER.reset(tokens[1])

    def untap(self) -> None:
        """Takes the taps off."""
        for handle in self.handles:
            handle.remove()


class EncoderNode:
    """A frozen encoder of pictures or sound: it is shown its own inputs, and hears nobody.

    Args:
        name: of the node.
        model: its encoder.
        node: where it is read, and how its positions are pooled.

    Raises:
        ConfigError: it hears others, or is read at its last position, which nothing makes the sum of the others.
    """

    encodes = True

    def __init__(self, name: str, model: PreTrainedModel, node: NodeConfig) -> None:
        self.name, self.model, self.node = name, model, node
        if node.hears:
            raise ConfigError(f"node {name!r} is an encoder, which hears nobody; leave out hears")
        if node.pooling == "last":
            raise ConfigError(
                f"node {name!r} is an encoder, whose last position stands for no other; set pooling to mean or "
                "attention"
            )
        try:
            self.at = self.layer = node.block("layer", backbone.num_blocks(model))
        except ConfigError as error:
            raise ConfigError(f"node {name!r}: {error}") from None

    @property
    def width(self) -> int:
        """Of its states."""
        return backbone.stream_width(self.model)

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return execution_device(self.model)

    @property
    def context(self) -> None:
        """It reads no tokens."""

    def states(self, batch: Batch, hear: Hear | None = None) -> tuple[Tensor, Tensor]:
        """Returns the states behind `layer`, (B, S, D), and which are real, (B, S).

        Raises:
            InputError: inputs that the encoder cannot read.
        """
        return backbone.encoder_states(self.model, batch, self.layer, f"node {self.name!r}")


def frozen_node(name: str, model: PreTrainedModel, node: NodeConfig) -> FrozenNode | EncoderNode:
    """Returns a model as the node that it can be."""
    kind = EncoderNode if backbone.is_encoder(model.config) else FrozenNode
    return kind(name, model, node)
