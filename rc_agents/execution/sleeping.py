"""Passes in which specialists sleep: who is woken, and the pass run again with whoever is.

A pass of one token is tried without the specialists that sleep. Where that shows that one is needed in some row, caches
are put back, it reads at once what it has missed (uncoupled, `CoupledPass._catch_up`), and the pass is run again with
it. A specialist runs if some row needs it; in the others its edges stay cut, so that a row is the same alone and in a
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..cache import CoupledCache
from ..selection import Choice
from ..sparse import Spared, Sparse
from ..topology import ANCHOR
from .coupled_pass import CoupledPass
from .protocol import Schedule
from .watch import Rows, Watch, heard_rows, may_sleep, unsure


def run_sparse(
    make: Callable[[Choice], CoupledPass],
    choice: Choice,
    memory: CoupledCache,
    schedule: Schedule,
    settings: Sparse,
    spared: Spared,
) -> tuple[CoupledPass, dict[str, Any]]:
    """Runs a pass without those who sleep and are not needed; returns it and each forward's output.

    Args:
        make: makes the pass for a choice of who speaks.
        choice: the call's own.
        memory: the ensemble's cache, which knows who sleeps.
        schedule: who runs when.
        settings: when somebody sleeps, and is woken.
        spared: counts.
    """
    whole = make(choice)
    sleepers = may_sleep(whole.ensemble)
    decodes = whole.past > 0 and whole.input_ids.shape[1] == 1
    asleep: Rows = dict(memory.asleep) if decodes and not whole.output_steered else {}
    while True:
        step = make(_without(choice, asleep, len(whole.input_ids))) if asleep else whole
        watch = Watch(whole, sleepers, asleep, settings)
        restore, behind = memory.snapshot() if asleep else None, _behind(step)
        outputs = step.run(watch.around(schedule))
        heard = watch.heard()
        if restore is None:
            break
        woken = watch.woken(heard, unsure(outputs[ANCHOR].logits, settings.certainty))
        if not woken:
            break
        restore()
        spared.repeated += 1
        asleep = _less(asleep, woken)
    if decodes:
        _count(spared, heard_rows(whole, sleepers), asleep, behind)
    if whole.use_cache:
        memory.asleep, memory.traces = watch.sleepy(heard), watch.traces
    return step, outputs


def _without(choice: Choice, asleep: Rows, num_rows: int) -> Choice:
    """Returns the choice with the edges of those who sleep cut in their rows."""
    strength = choice.strength
    strength = torch.ones(num_rows, len(choice.edges)) if strength is None else strength.clone()
    for place, edge in enumerate(choice.edges):
        for name in asleep.keys() & {*edge}:
            strength[asleep[name].to(strength.device), place] = 0
    return replace(choice, strength=strength)


def _less(asleep: Rows, woken: Rows) -> Rows:
    left = {name: rows & ~woken[name] if name in woken else rows for name, rows in asleep.items()}
    return {name: rows for name, rows in left.items() if rows.any()}


def _behind(step: CoupledPass) -> dict[str, int]:
    """Returns how many tokens each model that runs has missed."""
    own = step.ensemble.config.span_names
    return {
        name: step.past - step.memory.seen.get(name, 0) for name in step.running if name not in own
    }


def _count(spared: Spared, there: Rows, asleep: Rows, behind: dict[str, int]) -> None:
    for name, rows in there.items():
        spared.tokens[name] += int(rows.sum())
        if name in asleep:
            spared.skipped[name] += int((rows & asleep[name]).sum())
        spared.caught_up[name] += behind.get(name, 0) * len(rows)
