"""What becomes of an answer when a specialist's process dies, hangs or is cut off.

`python -m rc_agents.benchmarks.faults`. Every trial generates greedily over an ensemble of processes on loopback, each
specialist behind a relay of ours, and strikes at a random block of a random pass of the anchor: in the prompt's pass or
in a decoding one. The answer must have all its tokens, and be the one that a single process gives when that specialist
is disabled from the same token on. Then the specialist comes back, and the next answer must be the whole ensemble's.

Faults: kill (SIGKILL), stop (SIGSTOP), cut (its link swallows every byte), reset (its link is closed), and stall (its
link holds bytes back for less than the deadline, as a network that loses packets does: nobody may be lost).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.fault_cluster import Cluster
from rc_agents.benchmarks.fault_ensembles import real_ensemble, tiny_ensemble
from rc_agents.benchmarks.fault_trial import KINDS, Trial, run

from rc_agents.nodes import NodeSettings
from rc_agents.provenance import provenance


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
        },
    }


def main() -> None:
    """Strikes, prints a table, writes a record, and prints it as a JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=200, help="on tiny models")
    parser.add_argument("--real", type=int, default=20, help="on two SmolLM2-135M besides")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds, for tiny models")
    parser.add_argument("--real-deadline", type=float, default=10.0, help="seconds, for SmolLM2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/faults"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {}
    for which, make, count, deadline, tokens, prompt in (
        ("tiny", tiny_ensemble, arguments.faults, arguments.deadline, 12, (4, 64)),
        ("smollm2-135m", real_ensemble, arguments.real, arguments.real_deadline, 8, (32, 128)),
    ):
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            make(folder)
            cluster = Cluster(folder, NodeSettings(deadline=deadline))
            try:
                trials = run(cluster, count, tokens, prompt, arguments.seed)
            finally:
                cluster.close()
        record = {
            "benchmark": "faults",
            "ensemble": which,
            **summary(trials, deadline),
            "settings": {"tokens": tokens, "prompt": list(prompt), "seed": arguments.seed},
            "trials": [asdict(one) for one in trials],
            **provenance(arguments.seed),
        }
        file = arguments.output / f"{which}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{which}: {record['faults_survived']} of {count} survived", record["by_kind"])
        print(json.dumps({key: value for key, value in record.items() if key != "trials"}))


if __name__ == "__main__":
    main()
