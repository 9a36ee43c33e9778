"""What coupling costs in time: `make bench-speed`, ratios of interleaved medians, a JSON line last.

Two frozen SmolLM2-135M (float32) exchange both ways at five sites. One intra-op thread a model throughout.
`lockstep` is compared with the sum of the frozen models' own times, `threads` with the slower of them.
A pass is 256 tokens without cache; a step is one decoded token behind 64 in the cache.
`apart` is the frozen models in a thread each that never meet: what one Python interpreter takes by itself.
A specialist's output layer does not run in the ensemble, as nothing reads it; it does where the model is timed alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import rc_agents
from rc_agents import packaged
from rc_agents.provenance import provenance

LIMITS: dict[tuple[str, str], float | None] = {
    ("lockstep", "pass"): 1.05,
    ("lockstep", "step"): 1.05,
    ("threads", "pass"): 1.15,
    ("threads", "step"): 1.35,
    ("apart", "pass"): None,
    ("apart", "step"): None,
}


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, all of them once a round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return times


def decode(model: Any, ids: torch.Tensor, cache: Any, steps: int) -> None:
    """Feeds `steps` single tokens through a filled cache, then takes them off again."""
    for k in range(steps):
        model(input_ids=ids[:, k : k + 1], past_key_values=cache, use_cache=True)
    cache.crop(-steps)


def measure(
    model: rc_agents.CoupledForCausalLM, tokens: int, prefix: int, steps: int, repeats: int
) -> dict[str, Any]:
    """Times of the ensemble and of each frozen model by itself, for a pass and for decoded steps."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, model.config.vocab_size, (1, tokens), generator=generator)
    singles = {f"frozen {name}": single for name, single in model.models.items()}
    passes: dict[str, Callable[[], Any]] = {
        name: lambda single=single: single(input_ids=ids, use_cache=False)
        for name, single in singles.items()
    }
    runs: dict[str, Callable[[], Any]] = {}
    for name, single in singles.items():
        cache = DynamicCache(config=single.config)
        single(input_ids=ids[:, :prefix], past_key_values=cache, use_cache=True)
        runs[name] = lambda single=single, cache=cache: decode(single, ids, cache, steps)
    for schedule in ("lockstep", "threads"):
        passes[schedule] = lambda schedule=schedule: scheduled(model, schedule)(input_ids=ids)
        coupled = scheduled(model, schedule)(
            input_ids=ids[:, :prefix], use_cache=True
        ).past_key_values
        runs[schedule] = lambda schedule=schedule, cache=coupled: decode(
            scheduled(model, schedule), ids, cache, steps
        )
    with ThreadPoolExecutor(len(singles)) as pool:
        for calls in (passes, runs):
            alone = [calls[name] for name in singles]
            calls["apart"] = lambda alone=alone: [
                f.result() for f in [pool.submit(thread, c) for c in alone]
            ]
        return {"pass": interleaved(passes, repeats), "step": interleaved(runs, repeats)}


def thread(call: Callable[[], Any]) -> None:
    """Runs the call in this thread as the others run in theirs."""
    with torch.inference_mode():
        call()


def scheduled(model: rc_agents.CoupledForCausalLM, schedule: str) -> rc_agents.CoupledForCausalLM:
    """Returns the model after switching its schedule."""
    model.config.schedule = schedule
    return model


def ratios(times: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a schedule and kind: the ensemble's median over the frozen models' sum or maximum, round by round."""
    rows = []
    for kind, by_name in times.items():
        frozen = [values for name, values in by_name.items() if name.startswith("frozen")]
        for schedule, combine in (("lockstep", sum), ("threads", max), ("apart", max)):
            each = [
                own / combine(parts) for own, *parts in zip(by_name[schedule], *frozen, strict=True)
            ]
            base = combine(statistics.median(values) for values in frozen)
            rows.append(
                {
                    "schedule": schedule,
                    "kind": kind,
                    "ratio": statistics.median(by_name[schedule]) / base,
                    "low": min(each),
                    "high": max(each),
                    "limit": LIMITS[schedule, kind],
                    "against": "sum of the frozen" if combine is sum else "slowest frozen",
                }
            )
    return rows


def main() -> None:
    """Prints a table and a JSON line."""
    parser = argparse.ArgumentParser(
        description="Time coupled passes against the frozen models' own."
    )
    parser.add_argument(
        "--model", default="package:smollm2-135m", help="id, path or package:NAME of both models"
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prefix", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    place = (
        packaged.resolve(arguments.model)
        if packaged.is_packaged(arguments.model)
        else Path(arguments.model)
    )
    models = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32) for _ in range(2)]
    model = rc_agents.couple(
        models[0], {"twin": models[1]}, topology="star_bilateral", alignment="shared"
    )
    with torch.inference_mode():
        times = measure(
            model, arguments.tokens, arguments.prefix, arguments.steps, arguments.repeats
        )
    rows = ratios(times)
    print(
        f"{'schedule':9} {'kind':5} {'ratio':>6} {'lowest':>7} {'highest':>8} {'aim':>5}  against"
    )
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:.2f}"
        print(
            f"{row['schedule']:9} {row['kind']:5} {row['ratio']:6.3f} {row['low']:7.3f} {row['high']:8.3f} "
            f"{limit:>5}  {row['against']}"
        )
    record = {"benchmark": "speed", "settings": vars(arguments), "ratios": rows, **provenance(0)}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
