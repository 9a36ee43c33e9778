"""The same small search for every trained method: a few learning rates, judged on validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rc_agents.benchmarks.methods.bench import Bench, Fitted, better


def searched(
    bench: Bench, rates: Sequence[float], fit: Callable[[float, int | None], Fitted]
) -> Fitted:
    """Fits with each rate and returns the best by validation, with the search on record.

    Args:
        bench: which judges.
        rates: learning rates.
        fit: (rate, steps) -> a fitted method; steps None for the recipe's own. What it returned before may be
            overwritten by its next call.
    """
    begun = time.perf_counter()
    tried: list[dict[str, Any]] = []
    steps, fitted = bench.recipe.search_steps, None
    for rate in rates if len(rates) > 1 else ():
        fitted = fit(rate, steps)
        tried.append({"rate": rate, "steps": fitted.steps, **bench.validate(fitted.scorer)})
    best = max(tried, key=better)["rate"] if tried else rates[0]
    if fitted is None or steps is not None or best != tried[-1]["rate"]:
        fitted = fit(best, None)
    notes = {**fitted.notes, "rate": best}
    return replace(fitted, search=tried, seconds=time.perf_counter() - begun, notes=notes)
