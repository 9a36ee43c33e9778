"""What GPUs add: `make bench-gpu`, a table, a JSON line last. It needs a GPU, and two for what two have to show.

`parity`   the ensemble on its devices against the same on the processor: the largest difference of float32 logits
`overlap`  the share of the time in which any device computes in which at least two do, by torch.profiler
`ratio`    the ensemble's pass, and one decoded token, over the slowest of its models alone on the same device

Every model is on a device of its own as far as there are devices, the rest as `rc_agents.plan` says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import rc_agents
from rc_agents.provenance import provenance

Span = tuple[float, float]


def union(spans: Iterable[Span]) -> list[Span]:
    """The spans of time that any of these covers, in order and apart."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def overlap(by_device: Sequence[Sequence[Span]]) -> float:
    """Share of the time in which any device is busy in which at least two are."""
    busy = [union(spans) for spans in by_device]
    changes = sorted(
        (moment, change)
        for spans in busy
        for span in spans
        for moment, change in zip(span, (1, -1), strict=True)
    )
    any_time = two_time = 0.0
    running, last = 0, 0.0
    for moment, change in changes:
        any_time += (moment - last) * (running > 0)
        two_time += (moment - last) * (running > 1)
        running, last = running + change, moment
    return two_time / any_time if any_time else 0.0


def kernels(call: Callable[[], Any]) -> dict[int, list[Span]]:
    """When each device computes during a call, in microseconds: kernels alone, no copies."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        synchronize()
    found: dict[int, list[Span]] = {}
    for event in recorded.events() or ():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device and not event.name.startswith(("Memcpy", "Memset")):
            span = (event.time_range.start, event.time_range.end)
            found.setdefault(event.device_index, []).append(span)
    return found


def synchronize() -> None:
    """Waits for all devices."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, all devices done, after one that does not count."""
    spent = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])


def couple(
    arguments: argparse.Namespace, dtype: str, device_map: Any
) -> rc_agents.CoupledForCausalLM:
    """The ensemble that is measured, its bridges awake."""
    twins = {f"twin{number}": arguments.model for number in range(1, arguments.models)}
    model = rc_agents.couple(
        arguments.model,
        twins,
        bridge={"start": "default"},
        dtype=dtype,
        device_map=device_map,
        schedule=arguments.schedule,
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(drawn)
    return model


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Parity, overlap and ratios on the devices at hand."""
    generator = torch.Generator().manual_seed(arguments.seed)
    places = rc_agents.plan(
        arguments.model, {f"twin{n}": arguments.model for n in range(1, arguments.models)}
    ).device_map
    small = couple(arguments, "float32", "cpu")
    ids = torch.randint(100, small.config.vocab_size, (1, arguments.tokens), generator=generator)
    with torch.inference_mode():
        expected = small(input_ids=ids).logits
        there = couple(arguments, "float32", places)
        difference = (there(input_ids=ids.to(there.device)).logits.cpu() - expected).abs().max()
        del small, there
        model = couple(arguments, arguments.dtype, places)
        spans = kernels(lambda: model(input_ids=ids.to(model.device)))
        times = {
            "pass": _ratio(model, arguments.repeats, lambda one: _pass(one, ids)),
            "step": _ratio(model, arguments.repeats, lambda one: _step(one, ids)),
        }
    return {
        "device_map": {name: str(place) for name, place in places.items()},
        "parity": difference.item(),
        "overlap": overlap(list(spans.values())),
        "busy_devices": len(spans),
        "ratio": times,
    }


def _pass(model: Any, ids: Tensor) -> Callable[[], Any]:
    here = ids.to(model.device)
    return lambda: model(input_ids=here, use_cache=False)


def _step(model: Any, ids: Tensor) -> Callable[[], Any]:
    here = ids.to(model.device)
    cache = model(input_ids=here, use_cache=True).past_key_values

    def step() -> None:
        model(input_ids=here[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def _ratio(model: Any, repeats: int, made: Callable[[Any], Callable[[], Any]]) -> dict[str, float]:
    """Seconds of the ensemble and of its slowest model alone, and one over the other."""
    coupled = seconds(made(model), repeats)
    slowest = max(seconds(made(one), repeats) for one in model.models.values())
    return {"coupled": coupled, "slowest": slowest, "ratio": coupled / slowest}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table and a JSON line; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        description="Parity, overlap and latency of an ensemble on GPUs."
    )
    parser.add_argument(
        "--model", default="package:smollm2-135m", help="id, path or package:NAME of all models"
    )
    parser.add_argument("--models", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--schedule", default="threads")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "error: no GPU is here; bench-gpu needs one, and two to show overlap", file=sys.stderr
        )
        return 2
    found = measure(arguments)
    for kind, one in found["ratio"].items():
        print(f"{kind:5} coupled / slowest {one['ratio']:.3f}")
    print(f"largest difference from the processor {found['parity']:.2e}")
    print(
        f"devices busy {found['busy_devices']}, at least two of them {found['overlap']:.0%} of the time"
    )
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    record = {"benchmark": "gpu", "settings": vars(arguments), "gpus": names, **found}
    print(json.dumps(record | provenance(arguments.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
