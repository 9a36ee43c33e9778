"""The same small search for every trained method: a few learning rates, judged on validation."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rc_agents.benchmarks import files
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
    steps, fitted, file = bench.recipe.search_steps, None, search_file(bench, rates)
    tried: list[dict[str, Any]] = known_search(file)
    known = bool(tried)
    for rate in rates if len(rates) > 1 and not known else ():
        fitted = fit(rate, steps)
        found = {"rate": rate, "steps": fitted.steps, **bench.validate(fitted.scorer)}
        tried.append(found | ({"seed": bench.seed} if file else {}))
    if file and tried and not known:
        files.write(file, {"tried": tried})
    best = max(tried, key=better)["rate"] if tried else rates[0]
    if fitted is None or steps is not None or best != tried[-1]["rate"]:
        fitted = fit(best, None)
    notes = {**fitted.notes, "rate": best}
    return replace(fitted, search=tried, seconds=time.perf_counter() - begun, notes=notes)


def search_file(bench: Bench, tried: Sequence[Any]) -> Path | None:
    """Where a search lies that all seeds share; None where each has its own."""
    if not bench.recipe.shared_search:
        return None
    about = json.dumps([bench.key_of_all_seeds, bench.method, list(tried)])
    name = hashlib.sha256(about.encode()).hexdigest()[:16]
    return bench.folder / "searches" / f"{name}.json"


def known_search(file: Path | None) -> list[dict[str, Any]]:
    """Returns what another seed has tried, nothing where none has."""
    if file is None or not file.is_file():
        return []
    return list(files.read(file)["tried"])
