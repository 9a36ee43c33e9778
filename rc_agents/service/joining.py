"""Rows that join others while these are being answered: continuous batching with `generate`.

A call of `generate` is paused at a token where rows want to join. Their prompts are read in a call of their own, up to
the first token; the caches are laid side by side, rows that have ended are left out, and the next call goes on with all
of them. So whatever runs through `generate` (guides, samples, chosen specialists) is the same as without joining.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedConfig

from .. import cache_join, sparse
from ..cache import CoupledCache
from ..cache_join import Part
from ..modeling import CoupledForCausalLM
from . import running
from .going import Going
from .rows import context_limit

Joins = Callable[[int], Sequence[Going]]
"""Asked at first and once a token with the number of rows that run; returns those that join them."""

IDLE = 8
"""Tokens computed for rows that have ended, about as dear as a new call without them."""


def refusal(model: CoupledForCausalLM) -> str | None:
    """Returns why rows of an ensemble cannot join others that are being answered; None where they can."""
    if model.remote_names:
        return f"{', '.join(model.remote_names)} keep their caches in other processes"
    if model.config.span_names:
        return f"{', '.join(model.config.span_names)} read a text in tokens of their own"
    own = model.generation_config
    if own.use_cache is False or own.cache_implementation not in (None, "dynamic"):
        return f"the generation config asks for {own.cache_implementation or 'no'} cache"
    if sparse.current(model) is not None:
        return "specialists sleep"
    unknown = cache_join.unknown_layer(_configs(model))
    return None if unknown is None else f"the cache of {unknown[0]} has layers of type {unknown[1]}"


def run(model: CoupledForCausalLM, joins: Joins) -> None:
    """Generates rows as they come; returns when none runs and none comes."""
    joint = _Joint(model, joins)
    while joint.step():
        pass


def _configs(model: CoupledForCausalLM) -> dict[str, PreTrainedConfig]:
    return {name: one.config for name, one in model.readers.items()}


class _Joint:
    """Rows side by side, of which some come and some go."""

    def __init__(self, model: CoupledForCausalLM, joins: Joins) -> None:
        self._model, self._joins = model, joins
        self._rows: list[Going] = []  # that run
        self._fresh: list[Going] = []  # whose prompt was not read yet
        self._parts: list[Part] = []  # where the rows that run stand in their caches
        self._now: list[Going] = []  # that are in the call
        self._idle = 0  # tokens that it has computed for rows that had ended
        self._refused: Exception | None = None  # what asking for rows that join has raised
        limit = context_limit(model)
        self._room = None if limit is None else limit[1]

    def step(self) -> bool:
        """Goes on to the next pause; returns whether anything is left to do."""
        if not self._rows:
            self._fresh += self._joins(0)
        fresh, self._fresh = self._fresh, []
        for one in fresh:
            one.calls.begun()
        if self._rows:
            self._advance(fresh, None, lambda columns: True)
        else:
            self._rows = fresh
        if not self._rows:
            return False
        cache = cache_join.join(self._parts, _configs(self._model)) if self._parts else None
        rows, self._rows, self._parts = self._rows, [], []
        self._now, self._idle = rows, 0
        self._advance(rows, cache, self._pause)
        if self._refused is not None:
            raise self._refused
        return True

    def _advance(
        self, rows: list[Going], cache: CoupledCache | None, pause: Callable[[int], bool]
    ) -> None:
        """Takes rows further, and those that go on among the others; one by one where together they fail."""
        if not rows:
            return
        try:
            self._go_on(rows, running.advance(self._model, rows, cache, pause))
        except Exception as error:
            if len(rows) == 1:
                rows[0].fail(error)
            for one in rows if len(rows) > 1 else ():
                if not one.ended:
                    self._advance([one], None, lambda columns: True)

    def _go_on(self, rows: list[Going], cache: CoupledCache | None) -> None:
        """Keeps the rows that have not ended, without the padding that none of them needs."""
        kept = [place for place, one in enumerate(rows) if not one.ended]
        if not kept:
            return
        assert cache is not None
        columns = max(len(rows[place].tokens) for place in kept) - 1  # the last was not read yet
        self._rows += [rows[place] for place in kept]
        self._parts.append(Part(cache, torch.tensor(kept), columns))

    def _pause(self, columns: int) -> bool:
        """Whether to stop at this token: rows join, or what has ended costs time or runs out of its context."""
        left = sum(not one.ended for one in self._now)
        try:
            self._fresh += self._joins(left)
        except Exception as error:  # is not the rows' fault
            self._refused = error
            return True
        ended = len(self._now) - left
        full = self._room is not None and columns >= self._room
        self._idle += ended
        return bool(self._fresh) or self._idle >= IDLE or (full and ended > 0)
