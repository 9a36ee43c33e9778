"""What coupling costs between processes: `make bench-dist`, ratios of interleaved medians, a JSON line last.

SmolLM2-135M (float32) in two and in four processes on this machine, one intra-op thread each, star-bilateral at five
sites, over loopback. A pass is 256 tokens without cache; a step is one decoded token behind 64 in the cache. `apart` is
two processes that run their frozen models at the same time and never meet: what two models on these cores cost each
other by themselves. `published` generates 128 tokens behind a prompt of 256 in one process, cached and lockstep, over
the published loop, which runs both models over the whole text for every token (timed at every 16th length).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.fault_cluster import PROCESSES, serve
from rc_agents.benchmarks.speed import decode, interleaved
from transformers import AutoModelForCausalLM, DynamicCache

import rc_agents
from rc_agents import packaged
from rc_agents.nodes import NodeSettings, connect
from rc_agents.provenance import provenance

MODEL = "package:smollm2-135m"
LIMITS = {
    "two processes, pass": 1.05,
    "two processes, step": 1.20,
    "apart, pass": None,
    "apart, step": None,
    "four processes, pass": 1.10,
    "four processes, step": None,
    "published": 0.06,
}
LENGTH, PREFIX, STEPS = 256, 64, 16
EVERY = 16


def load() -> Any:
    """The frozen model."""
    return AutoModelForCausalLM.from_pretrained(packaged.resolve(MODEL), dtype=torch.float32).eval()


def calls_of(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """A pass and some steps of a model."""
    cache: Any = DynamicCache(config=model.config)
    if isinstance(model, rc_agents.CoupledForCausalLM):
        cache = model(input_ids=ids[:, :PREFIX], use_cache=True).past_key_values
    else:
        model(input_ids=ids[:, :PREFIX], past_key_values=cache, use_cache=True)
    return {
        "pass": lambda: model(input_ids=ids, use_cache=False),
        "step": lambda: decode(model, ids, cache, STEPS),
    }


def beside(pipe: Any, ids: torch.Tensor) -> None:
    """The body of a process that runs its frozen model whenever it is told to."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        calls = calls_of(load(), ids)
        pipe.send("ready")
        while (kind := pipe.recv()) is not None:
            calls[kind]()
            pipe.send("done")


@contextlib.contextmanager
def another(ids: torch.Tensor) -> Iterator[Callable[[str, Callable[[], Any]], None]]:
    """Gives what runs a call here and the same kind of call in another process, at the same time."""
    near, far = multiprocessing.Pipe()
    process = PROCESSES.Process(target=beside, args=(far, ids), daemon=True)
    process.start()
    near.recv()

    def both(kind: str, call: Callable[[], Any]) -> None:
        near.send(kind)
        call()
        near.recv()

    try:
        yield both
    finally:
        near.send(None)
        process.join(10)


@contextlib.contextmanager
def nodes(count: int) -> Iterator[rc_agents.CoupledForCausalLM]:
    """An ensemble of so many processes."""
    names = [f"twin{number}" for number in range(1, count)]
    with tempfile.TemporaryDirectory() as folder:
        made = rc_agents.couple(
            MODEL, dict.fromkeys(names, MODEL), topology="star_bilateral", dtype="float32"
        )
        made.save_pretrained(folder)
        del made
        settings = NodeSettings(deadline=60.0)
        model = connect(folder, settings=settings, wait=None)
        hub: Any = model.elsewhere
        processes = [
            PROCESSES.Process(
                target=serve, args=(folder, name, hub.door.address, settings), daemon=True
            )
            for name in names
        ]
        try:
            for process in processes:
                process.start()
            hub.wait_for(names, 120.0)
            yield model
        finally:
            hub.close()
            for process in processes:
                process.kill()
                process.join(10)


def measure(repeats: int) -> dict[str, list[float]]:
    """Ratios, round by round, by the names of `LIMITS`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40000, (1, LENGTH), generator=generator)
    ratios: dict[str, list[float]] = {}
    with nodes(2) as model, another(ids) as both:
        single = calls_of(model.models["anchor"], ids)
        coupled = calls_of(model, ids)
        for kind in ("pass", "step"):
            times = interleaved(
                {
                    "single": single[kind],
                    "coupled": coupled[kind],
                    "apart": lambda kind=kind: both(kind, single[kind]),
                },
                repeats,
            )
            ratios[f"two processes, {kind}"] = over(times, "coupled", 1.0)
            ratios[f"apart, {kind}"] = over(times, "apart", 1.0)
    with nodes(4) as model:
        single, coupled = calls_of(model.models["anchor"], ids), calls_of(model, ids)
        for kind in ("pass", "step"):
            times = interleaved({"single": single[kind], "coupled": coupled[kind]}, repeats)
            ratios[f"four processes, {kind}"] = over(times, "coupled", 4 / 2)
    ratios["published"] = published(ids, max(3, repeats // 5))
    return ratios


def over(times: dict[str, list[float]], name: str, factor: float) -> list[float]:
    """Each round's time over that of the single model, times a factor."""
    return [own / (factor * one) for own, one in zip(times[name], times["single"], strict=True)]


def published(ids: torch.Tensor, repeats: int) -> list[float]:
    """Cached generation over the published loop."""
    model = rc_agents.couple(MODEL, {"twin": MODEL}, topology="star_bilateral", dtype="float32")
    tokens = 128
    ratios = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        cached = time.perf_counter() - start
        loop = 0.0
        for grown in range(0, tokens, EVERY):
            text = torch.cat([ids, ids[:, :grown]], 1)
            start = time.perf_counter()
            model(input_ids=text, use_cache=False)
            loop += EVERY * (time.perf_counter() - start)
        ratios.append(cached / loop)
    return ratios


def main() -> None:
    """Prints a table, writes a record, prints it as a JSON line last."""
    parser = argparse.ArgumentParser(description="Time ensembles of several processes.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = measure(arguments.repeats)
    rows = [
        {
            "name": name,
            "ratio": statistics.median(values),
            "low": min(values),
            "high": max(values),
            "rounds": len(values),
            "limit": LIMITS[name],
        }
        for name, values in found.items()
    ]
    print(f"{'ratio':22} {'median':>7} {'lowest':>7} {'highest':>8} {'aim':>5}")
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:.2f}"
        print(
            f"{row['name']:22} {row['ratio']:7.3f} {row['low']:7.3f} {row['high']:8.3f} {limit:>5}"
        )
    record = {"benchmark": "dist", "repeats": arguments.repeats, "ratios": rows, **provenance(0)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "dist.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
