"""What perplexity pays for states that cross between processes in fewer bits.

`python -m rc_agents.benchmarks.wires`. Specialists run in processes of their own on loopback, and every document is
read once with each wire format, over the same links. Two ensembles: the demo's, whose gates read the token and whose
one site lies behind the last block; and SmolLM2-135M with its own twin, five sites both ways, each bridge an identity
that blends half of what is heard into the target, so that all that changes is the rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.files import write
from rc_agents.benchmarks.statistics import paired_ratio

import rc_agents
from rc_agents import BridgeConfig
from rc_agents.demo import texts
from rc_agents.nodes import Node, NodeSettings, connect
from rc_agents.provenance import provenance

WIRES = ("exact", "bfloat16", "int8")
BASE = "package:smollm2-135m"
PROCESSES = multiprocessing.get_context("spawn")
SETTINGS = NodeSettings(deadline=120.0)


def serve(place: str, name: str, anchor: tuple[str, int]) -> None:
    """The body of a specialist's process."""
    torch.set_num_threads(1)
    with contextlib.suppress(rc_agents.RCError):
        Node(place, name, settings=SETTINGS).serve(anchor, patience=60.0, once=True)


@contextlib.contextmanager
def over_nodes(place: str) -> Iterator[Any]:
    """The ensemble of a checkpoint, every specialist in a process of its own on loopback."""
    model: Any = connect(place, settings=SETTINGS, wait=None)
    hub = model.elsewhere
    started = [
        PROCESSES.Process(target=serve, args=(place, name, hub.door.address), daemon=True)
        for name in model.specialists
    ]
    try:
        for process in started:
            process.start()
        hub.wait_for(model.specialists, 120.0)
        yield model
    finally:
        hub.close()
        for process in started:
            process.join(10.0)
            process.kill()


def half_open(folder: str) -> None:
    """Saves SmolLM2-135M and its twin: five sites both ways, half of each state the other's."""
    half = BridgeConfig(update="blend", start="identity", gate_init=0.0, normalize_source=False)
    model = rc_agents.couple(
        BASE, {"twin": BASE}, topology="star_bilateral", sites=5, bridge=half, dtype="float32"
    )
    model.save_pretrained(folder)


@torch.inference_mode()
def loss_of(model: Any, ids: torch.Tensor) -> float:
    """Nats of all tokens of a document, (1, T), but its first."""
    logits = model(ids, use_cache=False).logits.float()
    nats = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    return float(nats)


def documents(tokenizer: Any, kind: str, count: int, length: int) -> list[torch.Tensor]:
    """The first held-out documents of a kind with so many tokens, (1, T) each."""
    found = []
    for record in texts.split(kind).test:
        ids = tokenizer(record.text, return_tensors="pt").input_ids[:, :length]
        if ids.shape[1] == length:
            found.append(ids)
        if len(found) == count:
            return found
    raise rc_agents.RCError(f"only {len(found)} {kind} documents have {length} tokens, not {count}")


def measure(model: Any, docs: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    """Nats of each document by wire format, all formats one document after the other."""
    nats: dict[str, list[float]] = {wire: [] for wire in WIRES}
    for ids in docs:
        for wire in WIRES:
            model.elsewhere.settings = replace(model.elsewhere.settings, wire=wire)
            nats[wire].append(loss_of(model, ids))
    lost = [event for event in model.elsewhere.events if event.what == "lost"]
    if lost:
        raise rc_agents.RCError(f"the measure is void: {lost[0].name} was lost, {lost[0].reason}")
    return nats


def summary(nats: dict[str, list[float]], num_tokens: int) -> dict[str, Any]:
    """Perplexities, and by how many percent they differ from the exact ones, 95 % over documents.

    Args:
        nats: of each document, by wire format.
        num_tokens: that each document's nats are the sum of.
    """
    weights = [float(num_tokens)] * len(nats["exact"])
    rows: dict[str, Any] = {}
    for wire, found in nats.items():
        rows[wire] = {"perplexity": round(math.exp(sum(found) / sum(weights)), 5)}
        if wire != "exact":
            interval, _ = paired_ratio(
                [(found, weights)],
                [(nats["exact"], weights)],
                lambda mine, other: 100 * math.expm1(mine - other),
            )
            rows[wire]["percent"] = {key: round(v, 5) for key, v in asdict(interval).items()}
    return rows


def main() -> None:
    """Measures, prints a table, writes a record, and prints it as a JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=20, help="of each kind")
    parser.add_argument("--tokens", type=int, default=128, help="of each document")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/links/wires.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance(0)  # of the code that runs, whatever is edited meanwhile
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        half_open(folder)
        for which, place in (("demo", "package:demo"), ("half_open_five_sites", folder)):
            with over_nodes(place) as model:
                for kind in ("general", "medical", "python"):
                    docs = documents(model.tokenizer, kind, arguments.documents, arguments.tokens)
                    found = summary(measure(model, docs), arguments.tokens - 1)
                    results.setdefault(which, {})[kind] = found
                    for wire, row in found.items():
                        print(f"{which:22} {kind:8} {wire:9} {row}", flush=True)
    record = {
        "benchmark": "wires",
        "tokens_counted": arguments.documents * (arguments.tokens - 1),
        "results": results,
        "settings": {"documents": arguments.documents, "tokens": arguments.tokens},
        **origin,
    }
    write(arguments.output, record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
