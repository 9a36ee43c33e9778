"""What `torch.compile` of every block gains: `python -m rc_agents.benchmarks.compiled`, a JSON line last.

SmolLM2-135M in float32, one thread, as it is and with each of its blocks compiled (dynamic shapes, the default backend,
as many graphs as it takes): processor time of a pass of so many tokens and of one decoded token behind them, medians of
interleaved rounds; and what compiling took.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
import torch._dynamo

import rc_agents
from rc_agents.provenance import provenance


def step(model: Any, ids: torch.Tensor, cache: Any) -> None:
    """One decoded token, taken off again."""
    model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    cache.crop(-1)


@torch.inference_mode()
def main() -> None:
    """Prints the ratios and a JSON line."""
    parser = argparse.ArgumentParser(description="Blocks compiled against blocks as they are.")
    parser.add_argument("--model", default="package:smollm2-135m", help="id, path or package:NAME")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    limits: Any = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit = 1024  # each block is a graph
    plain = rc_agents.couple(arguments.model, dtype="float32").models["anchor"]
    compiled = copy.deepcopy(plain)
    for block in compiled.model.layers:
        block.compile(dynamic=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(100, 40_000, (1, arguments.tokens), generator=generator)
    models, caches = {"plain": plain, "compiled": compiled}, {}
    start = time.process_time()
    for name, model in models.items():
        caches[name] = model(input_ids=ids, use_cache=True).past_key_values
        step(model, ids, caches[name])
    spent = time.process_time() - start
    print(f"compiling and first passes: {spent:.0f} s of processor time", flush=True)
    times: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in models} for kind in ("pass", "step")
    }
    for number in range(arguments.rounds + 2):
        for name, model in models.items():
            begun = time.process_time()
            model(input_ids=ids, use_cache=False)
            middle = time.process_time()
            step(model, ids, caches[name])
            if number > 1:
                times["pass"][name].append(middle - begun)
                times["step"][name].append(time.process_time() - middle)
    record: dict[str, Any] = {
        "benchmark": "compiled",
        "settings": vars(arguments),
        "first": spent,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }
    for kind, by_name in times.items():
        each = [a / b for a, b in zip(by_name["compiled"], by_name["plain"], strict=True)]
        ratio = statistics.median(by_name["compiled"]) / statistics.median(by_name["plain"])
        record[kind] = {"ratio": ratio, "low": min(each), "high": max(each)}
        print(f"{kind}: compiled / plain {ratio:.3f} ({min(each):.3f} to {max(each):.3f})")
    print(json.dumps(record | provenance(arguments.seed)))


if __name__ == "__main__":
    main()
