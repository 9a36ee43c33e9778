"""Rows that join others while these are being answered: continuous batching with `generate`.

A call of `generate` is paused at a token where rows want to join. Their prompts are read in a call of their own, up to
the first token; the caches are laid side by side, rows that have ended are left out, and the next call goes on with all
of them. So whatever runs through `generate` (guides, samples, chosen specialists) is the same as without joining.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedConfig

from .. import cache_join, sparse
from ..cache import CoupledCache
from ..cache_join import Part
from ..execution import LOST
from ..modeling import CoupledForCausalLM
from . import running
from .going import Going
from .rows import context_limit, fit_together, shown_alike

Joins = Callable[[int], Sequence[Going]]
"""Asked at first and once a token with the number of rows that run; returns those that join them."""

LOG = logging.getLogger(__name__)
COUNTING = {
    **{"min_length": 0, "min_new_tokens": 0, "guidance_scale": 1},
    **dict.fromkeys(("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("exponential_decay_length_penalty", "max_time")),
}
"""What `generate` counts from its own beginning, or keeps a cache of its own for, with the value, beside None, at which
it does nothing."""
IDLE = 8
"""Tokens computed for rows that have ended, about as dear as a new call without them."""


def refusal(model: CoupledForCausalLM) -> str | None:
    """Returns why rows of an ensemble cannot join others that are being answered; None where they can."""
    if model.remote_names:
        return f"{', '.join(model.remote_names)} keep their caches in other processes"
    own = model.generation_config
    if own.use_cache is False or own.cache_implementation is not None:
        return f"the generation config asks for {own.cache_implementation or 'no'} cache"
    counting = [
        name for name, off in COUNTING.items() if getattr(own, name, None) not in (None, off)
    ]
    if counting:
        return f"the generation config sets {', '.join(counting)}, counted from where a call begins"
    if sparse.current(model) is not None:
        return "specialists sleep"
    unknown = cache_join.unknown_layer(_configs(model))
    return None if unknown is None else f"the cache of {unknown[0]} has layers of type {unknown[1]}"


def run(model: CoupledForCausalLM, joins: Joins) -> None:
    """Generates rows as they come; returns when none runs and none comes."""
    LOST.set({})
    joint = _Joint(model, joins)
    while joint.step():
        pass


def _configs(model: CoupledForCausalLM) -> dict[str, PreTrainedConfig]:
    return {name: one.config for name, one in model.readers.items()}


class _Joint:
    """Rows side by side, of which some come and some go."""

    def __init__(self, model: CoupledForCausalLM, joins: Joins) -> None:
        self._model, self._joins = model, joins
        self._waiting: list[Going] = []  # whose prompt was not read yet
        self._rows: list[Going] = []  # that run
        self._parts: list[Part] = []  # where they stand in their caches
        self._now: list[Going] = []  # that are in the call
        self._idle = 0  # tokens that it has computed for rows that had ended
        self._refused: Exception | None = None  # what asking for rows that join has raised
        limit = context_limit(model)
        self._room = None if limit is None else limit[1]

    def step(self) -> bool:
        """Goes on to the next pause; returns whether anything is left to do."""
        if not self._rows and not self._waiting:
            self._waiting += self._joins(0)
        fresh = self._fitting(self._rows)
        del self._waiting[: len(fresh)]
        fresh = [one for one in fresh if _begun(one)]
        if self._rows:
            self._advance(fresh, [], lambda columns: True)
        else:
            self._rows = fresh
        rows, parts = self._rows, self._parts
        self._rows, self._parts = [], []
        self._now, self._idle = rows, 0
        self._advance(rows, parts, self._pause)
        if self._refused is not None:
            raise self._refused
        return bool(rows or self._waiting)

    def _fitting(self, running: Sequence[Going]) -> list[Going]:
        """The first of the rows that wait, as far as all models that then run have room for all rows."""
        beside = [one.row for one in running]
        fresh: list[Going] = []
        for one in self._waiting:
            beside.append(one.row)
            if len(beside) > 1 and not fit_together(self._model, beside):
                break
            if not shown_alike([*(other.row for other in fresh), one.row]):
                break  # it is read by itself
            fresh.append(one)
        return fresh

    def _advance(self, rows: list[Going], parts: list[Part], pause: Callable[[int], bool]) -> None:
        """Takes rows further, and keeps those that go on; where they fail together, each is read again."""
        if not rows:
            return
        try:
            cache = cache_join.join(parts, _configs(self._model)) if parts else None
            self._go_on(rows, running.advance(self._model, rows, cache, pause))
            return
        except Exception as error:
            if len(rows) == 1 and not parts:
                rows[0].fail(error)
                return
            kind = type(error).__name__
            traceback.clear_frames(error.__traceback__)  # which hold the caches
        LOG.warning("a pass of %d rows failed with %s; each is read again", len(rows), kind)
        together, left = bool(parts), [one for one in rows if not one.ended]
        parts.clear()
        caches = [self._alone(one, lambda columns: True) for one in left]
        if not together or any(one.error is not None for one in left):
            for one, cache in zip(left, caches, strict=True):
                self._go_on([one], cache)
            return
        caches.clear()
        for one in left:  # none is at fault but that they are together
            self._alone(one, None)

    def _alone(self, row: Going, pause: Callable[[int], bool] | None) -> CoupledCache | None:
        """Reads a row from its tokens and goes on to the pause, or to its end; it ends where it fails."""
        if row.ended:
            return None
        try:
            return running.advance(self._model, [row], None, pause)
        except Exception as error:
            row.fail(error)
            return None

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
        left = [one for one in self._now if not one.ended]
        try:
            self._waiting += self._joins(len(left) + len(self._waiting))
        except Exception as error:  # is not the rows' fault
            self._refused = error
            return True
        ended = len(self._now) - len(left)
        full = self._room is not None and columns >= self._room
        self._idle += ended
        return bool(self._fitting(left)) or self._idle >= IDLE or (full and ended > 0)


def _begun(row: Going) -> bool:
    """Tells that a row's prompt is about to be read; it ends where that fails."""
    try:
        row.calls.begun()
    except Exception as error:
        row.fail(error)
        return False
    return True
