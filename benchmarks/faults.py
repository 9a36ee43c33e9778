"""What becomes of an answer when a specialist's process dies, hangs or is cut off.

`python -m rc_agents.benchmarks.faults`. Every trial generates greedily over an ensemble of processes and strikes at a
random block of a random pass of the anchor: in the prompt's pass or in a decoding one. The answer must have all its
tokens, and be the one that a single process gives when that specialist is disabled from the same token on. Then the
specialist comes back, and the next answer must be the whole ensemble's.

Faults, with each specialist behind a relay of ours on loopback: kill (SIGKILL), stop (SIGSTOP), cut (its link swallows
every byte), reset (its link is closed), and stall (its link holds bytes back for less than the deadline, as a network
that loses packets does: nobody may be lost). With every process in a network namespace of its own: down (the
specialist's veth link is set down); this needs root on Linux with iproute2, and is left out elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.fault_cluster import Cluster
from rc_agents.benchmarks.fault_ensembles import real_ensemble, tiny_ensemble
from rc_agents.benchmarks.fault_relay import Loopback
from rc_agents.benchmarks.fault_segment import NEEDS, Segment, segment
from rc_agents.benchmarks.fault_trial import Trial, run
from rc_agents.benchmarks.files import write
from rc_agents.benchmarks.shaped import CannotShape

from rc_agents.nodes import NodeSettings
from rc_agents.provenance import provenance

KINDS = (*Loopback.kinds, *Segment.kinds)


def strike(
    folder: str,
    settings: NodeSettings,
    count: int,
    kinds: Sequence[str],
    tokens: int,
    prompt: tuple[int, int],
    seed: int,
) -> tuple[list[Trial], dict[str, str]]:
    """Shares so many faults out among the kinds, and those among the networks that can do them.

    Returns:
        The trials, and for each kind that cannot be done here, why.
    """
    made: list[Trial] = []
    left_out: dict[str, str] = {}
    networks: list[tuple[Sequence[str], contextlib.AbstractContextManager[Loopback | Segment]]] = [
        (Loopback.kinds, contextlib.nullcontext(Loopback())),
        (Segment.kinds, segment()),
    ]
    for able, network in networks:
        here = [kind for kind in kinds if kind in able]
        share = sum(kinds[number % len(kinds)] in here for number in range(count))
        if not share:
            continue
        with contextlib.ExitStack() as stack:
            try:
                cluster = Cluster(folder, settings, stack.enter_context(network))
            except CannotShape as why:
                left_out |= dict.fromkeys(here, str(why))
                print(f"{', '.join(here)}: left out, as this needs {NEEDS}; {why}")
                continue
            stack.callback(cluster.close)
            made += run(cluster, share, tokens, prompt, seed, here)
    return made, left_out


def summary(trials: Sequence[Trial], deadline: float) -> dict[str, Any]:
    """The figures of record."""
    return {
        "faults_injected": len(trials),
        "faults_survived": sum(one.survived for one in trials),
        "specialists_lost": sum(one.noticed is not None for one in trials),
        "tokens_lost": sum(one.missing for one in trials),
        "answers_unequal": sum(not one.equal for one in trials),
        "longest_stall_s": round(max(one.stall_s for one in trials), 3),
        "longest_wait_s": round(max(one.waited_s for one in trials), 3),
        "deadline_s": deadline,
        "by_kind": {
            kind: {
                phase: [
                    sum(one.survived for one in trials if (one.kind, one.phase) == (kind, phase)),
                    sum((one.kind, one.phase) == (kind, phase) for one in trials),
                ]
                for phase in ("prefill", "decode")
            }
            for kind in KINDS
            if any(one.kind == kind for one in trials)
        },
    }


def main() -> None:
    """Strikes, prints a table, writes a record, and prints it as a JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=240, help="on tiny models")
    parser.add_argument("--real", type=int, default=24, help="on two SmolLM2-135M besides")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds, for tiny models")
    parser.add_argument("--real-deadline", type=float, default=10.0, help="seconds, for SmolLM2")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/faults"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go
    kinds = tuple(arguments.kinds)
    suffix = "" if kinds == KINDS else "-" + "-".join(kinds)
    for which, make, count, deadline, tokens, prompt in (
        ("tiny", tiny_ensemble, arguments.faults, arguments.deadline, 12, (4, 64)),
        ("smollm2-135m", real_ensemble, arguments.real, arguments.real_deadline, 8, (32, 128)),
    ):
        if not count:
            continue
        origin = provenance(arguments.seed)  # of the code that runs
        with tempfile.TemporaryDirectory() as folder:
            make(folder)
            settings = NodeSettings(deadline=deadline)
            trials, left_out = strike(
                folder, settings, count, kinds, tokens, prompt, arguments.seed
            )
        if not trials:
            continue
        record = {
            "benchmark": "faults",
            "ensemble": which,
            **summary(trials, deadline),
            "left_out": left_out,
            "settings": {"tokens": tokens, "prompt": list(prompt), "seed": arguments.seed},
            "trials": [asdict(one) for one in trials],
            **origin,
        }
        write(arguments.output / f"{which}{suffix}.json", record)
        survived = f"{record['faults_survived']} of {len(trials)} survived"
        print(f"{which}: {survived}", record["by_kind"])
        print(json.dumps({key: value for key, value in record.items() if key != "trials"}))


if __name__ == "__main__":
    main()
