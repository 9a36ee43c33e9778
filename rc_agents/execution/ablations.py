"""What a bridge reads in place of its source, to tell what the source is worth."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, nearest
from .exchange import EXCHANGE, Exchange

if TYPE_CHECKING:
    from ..modeling import CoupledForCausalLM

Ablation = Literal["zero", "shuffled"]


class _Zero(Exchange):
    def _source(self, *reads: Any) -> Tensor:
        return torch.zeros_like(super()._source(*reads))


class _Shuffled(Exchange):
    part: float

    def _source(self, *reads: Any) -> Tensor:
        read_BTD = super()._source(*reads)
        rows = len(read_BTD)
        if rows < 2:
            raise InputError(
                "a shuffled source is that of another prompt in the batch, and this batch has one row; pass several"
            )
        return read_BTD.roll(min(max(round(self.part * rows), 1), rows - 1), dims=0)


@contextmanager
def ablated(model: CoupledForCausalLM, how: Ablation, seed: int = 0) -> Iterator[None]:
    """Makes every bridge of `model` read something else inside the block, in this thread and context.

    Args:
        model: an ensemble with bridges.
        how: `zero` for zeros; `shuffled` for the states of another prompt of the same batch: each row reads the row a
            third to two thirds of the batch before it, so that rows which repeat one prompt side by side (as choices
            or beams do) do not read each other where the batch holds three prompts or more.
        seed: how far before.

    Raises:
        ConfigError: another word, or a model without bridges.
        InputError: inside the block, a shuffled batch of one row.
    """
    if how not in get_args(Ablation):
        raise ConfigError(f"unknown ablation {how!r}; {nearest(str(how), get_args(Ablation))}")
    if not model.edges:
        raise ConfigError("an ablation changes what bridges read, and this ensemble has none")
    before = EXCHANGE.get()
    part = random.Random(f"shuffled:{seed}").uniform(1 / 3, 2 / 3)

    def exchange(*arguments: Any) -> Exchange:
        if getattr(arguments[1], "__self__", None) is not model:
            return before(*arguments)  # another ensemble's pass inside the block
        if how == "zero":
            return _Zero(*arguments)
        made = _Shuffled(*arguments)
        made.part = part
        return made

    token = EXCHANGE.set(exchange)
    try:
        yield
    finally:
        EXCHANGE.reset(token)
