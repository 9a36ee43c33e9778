"""What joining at a token gives: `python -m rc_agents.benchmarks.joining`, seconds and ratios, a JSON line last.

While two long answers are written, one client asks for short ones, the next when the last has come. The same single
model behind `rc-agents serve`, the same without joining, and `transformers serve` with and without its continuous
batching; rounds are interleaved. Servers run on loopback and end with the benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from rc_agents.benchmarks.serving import QUESTIONS, Server, ours, theirs

from rc_agents import packaged
from rc_agents.provenance import provenance

LONG, SHORT = 2, 6  # answers of a round
MEASURED = ("first", "short", "all")


def main() -> None:
    """Runs the benchmark by its command line."""
    read = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    read.add_argument("--model", default="package:smollm2-135m")
    read.add_argument("--rounds", type=int, default=3)
    read.add_argument("--long", type=int, default=128, help="new tokens of a long answer")
    read.add_argument("--short", type=int, default=8, help="new tokens of a short answer")
    read.add_argument("--threads", type=int, default=None, help="of each server")
    args = read.parse_args()
    place = str(packaged.resolve(args.model)) if packaged.is_packaged(args.model) else args.model
    started = {
        "rc-agents serve": ours(place, args.threads),
        "rc-agents serve --no-continuous": ours(place, args.threads, "--no-continuous"),
        "transformers serve": theirs(place, args.threads),
        "transformers serve --continuous-batching": theirs(
            place, args.threads, "--continuous-batching"
        ),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in started}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(one) for name, one in started.items()}
        for turn in range(args.rounds + 1):
            for name, server in servers.items():
                measured = _round(server, args.long, args.short)
                if turn:  # the first round warms up
                    found[name].append(measured)
    _report(found, args)


def _round(server: Server, long: int, short: int) -> dict[str, float]:
    """Seconds of a short answer (the median), and of all answers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(LONG) as pool:
        running = [pool.submit(server.ask, QUESTIONS[-one], long) for one in range(LONG)]
        time.sleep(0.5)  # they are being answered
        seconds = []
        for question in QUESTIONS[:SHORT]:
            asked = time.perf_counter()
            server.ask(question, short)
            seconds.append(time.perf_counter() - asked)
        for one in running:
            one.result()
    return {
        "short": statistics.median(seconds),
        "first": seconds[0],
        "all": time.perf_counter() - began,
    }


def _report(found: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    print(
        "| server | first short answer, s | a short answer, s | all answers, s |\n|---|---|---|---|"
    )
    for name, rounds in found.items():
        cells = []
        for one in MEASURED:
            values = [measured[one] for measured in rounds]
            cells.append(
                f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            )
        print(f"| {name} | {' | '.join(cells)} |")
    first, *others = found
    ratios = {
        f"{one} over {other}: {what}": statistics.median(
            a[what] / b[what] for a, b in zip(found[one], found[other], strict=True)
        )
        for one in (first,)
        for other in others
        for what in MEASURED
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    made = {"model": args.model, "long": args.long, "short": args.short, "rounds": args.rounds}
    print(
        json.dumps(
            {"benchmark": "joining", **made, "ratios": ratios, "seconds": found, **provenance(0)}
        )
    )


if __name__ == "__main__":
    main()
