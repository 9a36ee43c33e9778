"""What a link between two processes of an ensemble costs, in seconds and bytes: loopback, LAN, WAN, edge uplink.

`python -m rc_agents.benchmarks.links`, as root on Linux with iproute2. A model and its twin: the anchor's process
in one network namespace, the twin's twice, beside the anchor on loopback and in another namespace behind a shaped link
(`shaped.py`). Both ensembles take turns at the same tokens, so that what else runs on the machine meets both alike.
Every figure is compared with what the cost model predicts from the loopback's (`cost_model.py`).

Two pairs: SmolLM2-135M, and random models of its width that compute next to nothing, so that the link is all there is.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.files import read, write
from rc_agents.benchmarks.link_forms import FORMS, PAIRS, PROFILES
from rc_agents.benchmarks.link_rows import line, table
from rc_agents.benchmarks.link_times import compare
from rc_agents.benchmarks.shaped import ANCHOR_HOST, CannotShape, Delay, Namespaces, namespaces

from rc_agents.provenance import provenance


def inside(arguments: argparse.Namespace) -> None:
    """Measures, in the anchor's namespace; writes the record after each form, and prints it as a JSON line last."""
    spaces = Namespaces(*arguments.inside[:2])
    arguments.until = time.monotonic() + 60 * arguments.minutes
    arguments.origin = provenance(arguments.seed)  # of the code that runs
    relay = Delay(ANCHOR_HOST)
    found: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    try:
        for pair in PAIRS:
            for form in FORMS:
                if pair.name in arguments.pairs and time.monotonic() < arguments.until:
                    for row in compare(pair, form, relay, spaces, arguments):
                        found.append(row)
                        print(line(row), flush=True)
                    record = recorded(found, arguments)
                    write(arguments.output, record)
    finally:
        relay.close()
    print(json.dumps(record))


def recorded(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """The record."""
    settings = {key: getattr(arguments, key) for key in ("steps", "tokens", "seed")}
    return {
        "benchmark": "links",
        "profiles": [asdict(profile) for profile in PROFILES],
        "pairs": [asdict(pair) for pair in PAIRS],
        "forms": [asdict(form) for form in FORMS],
        "rows": rows,
        "settings": settings,
        "load_average": os.getloadavg(),
        **arguments.origin,
    }


def main() -> None:
    """Makes the namespaces, measures in them, and removes them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="decoded tokens of a round")
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="begins no cell after that")
    parser.add_argument("--pairs", nargs="+", default=[pair.name for pair in PAIRS])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/links/links.json"))
    parser.add_argument("--show", type=Path, help="print this record's tables, measure nothing")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.show:
        for kind in ("decode", "prefill"):
            print(table(read(arguments.show)["rows"], kind), end="\n\n")
        return
    if arguments.inside:
        inside(arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go
    try:
        with namespaces() as spaces, tempfile.NamedTemporaryFile() as secret_file:
            secret_file.write(os.urandom(32).hex().encode())
            secret_file.flush()
            spaces.shape(PROFILES[0].up, PROFILES[0].down)
            told = ["--inside", spaces.anchor, spaces.specialist, secret_file.name]
            again = [sys.executable, "-m", "rc_agents.benchmarks.links", *sys.argv[1:], *told]
            subprocess.run(["ip", "netns", "exec", spaces.anchor, *again], check=True)
    except CannotShape as why:
        print(f"skipped: this needs root, network namespaces and tbf on Linux; {why}")


if __name__ == "__main__":
    main()
