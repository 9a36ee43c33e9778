"""How much room each model's context has left while a call generates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from .errors import InputError

RESERVE = 16
"""Tokens left free for a model with its own tokenizer, as one more token of the anchor's may be several of its."""

_ROOM: ContextVar[Room | None] = ContextVar("rc_agents_room", default=None)


class Room(StoppingCriteria):
    """Ends generation, all rows of it, where one more token is more than some model takes.

    Every pass of `owner` reports here how long its text has become.

    Args:
        owner: the ensemble that generates.

    Attributes:
        full: the rows that leave no room for another token.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.full: set[int] = set()
        self.left = math.inf
        self.shortest = ""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, T) tokens -> (B,), whether to end."""
        end, self.left = self.left <= 0, math.inf
        if end:
            warnings.warn(
                f"generation ends here: {self.shortest}; shorten the prompt, or leave that model out",
                stacklevel=2,
            )
        return torch.full((len(input_ids),), end, device=input_ids.device)


@contextmanager
def watched(owner: object) -> Iterator[Room]:
    """Lets a `Room` hear of every pass of `owner` inside the block."""
    room = Room(owner)
    token = _ROOM.set(room)
    try:
        yield room
    finally:
        _ROOM.reset(token)


def current(owner: object) -> Room | None:
    """Returns the room of the call of `owner` around this one."""
    room = _ROOM.get()
    return room if room is not None and room.owner is owner else None


def limit_of(config: Any) -> int | None:
    """Returns how many tokens a model of this config was made for; None where it names no limit."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_fits(
    owner: object, name: str, config: Any, counts: Sequence[int], *, own_tokens: bool
) -> None:
    """Raises `InputError` where a text is longer than a model was made for; reports what is left.

    Args:
        owner: the ensemble.
        name: the model's name.
        config: the model's.
        counts: tokens of each row, in the model's own tokens.
        own_tokens: whether the model has its own tokenizer.
    """
    limit = limit_of(config)
    if limit is None:
        return
    count = max(counts)
    if limit < count:
        raise InputError(
            f"the text has {count} tokens for model {name!r}, which takes at most {limit}; "
            "shorten it, or leave that model out with model.disabled(...)"
        )
    room = current(owner)
    if room is None:
        return
    last = limit - (RESERVE if own_tokens else 0)
    room.full |= {row for row, size in enumerate(counts) if size >= last}
    if last - count < room.left:
        room.left = last - count
        room.shortest = (
            f"the text has {count} tokens for model {name!r}, which takes at most {limit}"
        )
