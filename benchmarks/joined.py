"""What joining a site's edges into one product would save: `python -m rc_agents.benchmarks.joined`, a JSON line last.

Linear bridges into one target as they are, one product an edge, against the same maps as one product over their
sources side by side, [W_1 ... W_n] [g_1 n(h_1); ...; g_n n(h_n)]: processor time of both, medians of interleaved
rounds, beside that of one decoded token of the target's model. SmolLM2-135M's width, float32, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from rc_agents.provenance import provenance

WIDTH = 576


def apart(weights: list[Tensor], sources: list[Tensor], gates: list[Tensor]) -> Tensor:
    """One product an edge."""
    total = torch.zeros_like(sources[0])
    for weight, source, gate in zip(weights, sources, gates, strict=True):
        total = total + linear(source, weight) * gate
    return total


def joined(weight: Tensor, sources: list[Tensor], gates: list[Tensor]) -> Tensor:
    """One product for all edges."""
    side_by_side = torch.cat([s * g for s, g in zip(sources, gates, strict=True)], -1)
    return linear(side_by_side, weight)


def seconds(calls: dict[str, Callable[[], Tensor]], rounds: int, inner: int) -> dict[str, float]:
    """Median processor seconds of each call, interleaved, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(inner):
                call()
            if number:
                times[name].append((time.process_time() - start) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def main() -> None:
    """Prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description="Edges of a site apart and as one product.")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(arguments.seed)
    found = []
    print(f"{'edges':>5} {'tokens':>6} {'apart, us':>10} {'joined, us':>10} {'ratio':>6}")
    for edges in (1, 2, 5):
        for tokens in (1, 16, 256):
            weights = [torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(edges)]
            sources = [torch.randn(1, tokens, WIDTH, generator=generator) for _ in range(edges)]
            gates = [torch.rand(1, tokens, 1, generator=generator) for _ in range(edges)]
            whole = torch.cat(weights, -1)
            torch.testing.assert_close(
                apart(weights, sources, gates),
                joined(whole, sources, gates),
                rtol=1e-3,
                atol=1e-3,
            )
            calls: dict[str, Callable[[], Tensor]] = {
                "apart": lambda w=weights, s=sources, g=gates: apart(w, s, g),
                "joined": lambda w=whole, s=sources, g=gates: joined(w, s, g),
            }
            times = seconds(calls, arguments.rounds, 1 + 400 // tokens)
            ratio = times["apart"] / times["joined"]
            print(
                f"{edges:5} {tokens:6} {1e6 * times['apart']:10.0f} {1e6 * times['joined']:10.0f} {ratio:6.2f}"
            )
            found.append({"edges": edges, "tokens": tokens, **times, "ratio": ratio})
    record = {"benchmark": "joined", "rounds": arguments.rounds, "found": found}
    print(json.dumps(record | provenance(arguments.seed)))


if __name__ == "__main__":
    main()
