"""Does a graph compose? A task that takes two nodes together: `python -m rc_agents.benchmarks.composition`.

Each of two nodes reads its own half of a question, and a half says one bit; the answer is the exclusive or of both. A
third model hears them and reads a text that says nothing. Tiny random models, so nothing is known beforehand: what is
right is composed through frozen models. Beside it a head on each single node with as many trained values.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rc_agents.benchmarks.files import write
from rc_agents.benchmarks.statistics import wilson
from rc_agents.benchmarks.tiny_models import NOUNS, VOCABULARY, place

from rc_agents import graph as graphs
from rc_agents.provenance import provenance

HEARD = ("left", "right")
WIDTHS = {"left": 32, "right": 48, "judge": 64}
SPREAD = 0.15  # of random weights: with the usual 0.02 a random model is close to a linear one
NOTHING = "Are they alike?"
SIZES = (500, 100, 300)
CONFIG = graphs.GraphTrainConfig(steps=400, batch_size=32, learning_rate=3e-3, eval_steps=40)
RESULTS = Path("benchmarks/results/graph/composition")


def graph_config() -> graphs.GraphConfig:
    """Returns the graph: both halves are heard behind the judge's first block."""
    nodes = {name: graphs.NodeConfig(pooling="mean") for name in HEARD}
    nodes["judge"] = graphs.NodeConfig(hears=HEARD, at=1)
    return graphs.GraphConfig(
        nodes=nodes,
        latent=graphs.LatentConfig(width=32),
        output=graphs.OutputConfig(width=32, choices=2),
    )


def head_config(name: str, parameters: int) -> graphs.GraphConfig:
    """Returns a head on one node, with at least so many trained values."""
    return graphs.GraphConfig(
        nodes={name: graphs.NodeConfig(pooling="mean")},
        output=graphs.OutputConfig(
            readout="head", width=graphs.matched_width(parameters, WIDTHS[name], 2), choices=2
        ),
    )


def models(names: Sequence[str]) -> dict[str, Any]:
    """Returns random models of three architectures, the same each time."""
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, **shared}
    configs = {
        "left": lambda: transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=4, **heads
        ),
        "right": lambda: transformers.GPT2Config(n_embd=48, n_layer=6, n_head=4, **shared),
        "judge": lambda: transformers.Qwen2Config(
            hidden_size=64, intermediate_size=128, num_hidden_layers=6, **heads
        ),
    }
    found = {}
    for number, name in enumerate(configs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            model = transformers.AutoModelForCausalLM.from_config(
                configs[name](), dtype=torch.float32
            )
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=SPREAD)
        if name in names:
            found[name] = model
    return found


def build(config: graphs.GraphConfig, seed: int = 0) -> graphs.LatentGraph:
    """Builds a graph or a head over the random models."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place("tiny:llama"))
    names = list(config.nodes)
    return graphs.build(
        config, models(names), tokenizers=dict.fromkeys(names, tokenizer), seed=seed
    )


def questions(seed: int = 0) -> list[list[graphs.Asked]]:
    """Returns training, validation and test questions; no pair of halves is in two of them, answers are even."""
    rng = random.Random(f"halves:{seed}")
    seen: set[tuple[str, str]] = set()
    parts = []
    for count in SIZES:
        found: list[graphs.Asked] = []
        while len(found) < count:
            bits = divmod(len(found) % 4, 2)
            left, right = (_half(bit, rng) for bit in bits)
            if (left, right) not in seen:
                seen.add((left, right))
                texts = {"left": left, "right": right, "judge": NOTHING}
                found.append(graphs.Asked.by_node(texts, 2, bits[0] ^ bits[1]))
        rng.shuffle(found)
        parts.append(found)
    return parts


def _half(bit: int, rng: random.Random) -> str:
    nouns = NOUNS[:6] if bit else NOUNS[6:]
    return "the " + " and the ".join(rng.choice(nouns) for _ in range(3))


def alone(part: Sequence[graphs.Asked], name: str) -> list[graphs.Asked]:
    """Returns questions as one node reads them."""
    return [graphs.Asked({name: one.texts[name]}, one.num_choices, one.label) for one in part]


def run(
    config: graphs.GraphConfig, seed: int, keep: Path, steps: int | None = None
) -> dict[str, Any]:
    """Trains a graph or a head, and answers the test questions."""
    graph = build(config, seed)
    parts = questions()
    if len(config.nodes) == 1:
        parts = [alone(part, next(iter(config.nodes))) for part in parts]
    settings = replace(CONFIG, seed=seed, steps=steps or CONFIG.steps)
    whole = (
        len(config.nodes) > 1
    )  # what a head reads comes with both answers, so it is judged by nothing
    result = graphs.train(
        graph,
        parts[0],
        config=settings,
        validation=parts[1] if whole else (),
        keep=keep,
        progress=False,
    )
    kept = graphs.Kept(graph, keep, progress=False)
    kept.complete({name: [one.texts[name][0] for one in parts[2]] for name in config.nodes})
    run_of = graphs.Replay(graph, kept).of
    report = graphs.report(
        graph, parts[2], run_of=run_of, batch_size=64, leave_one_out=bool(config.hearing)
    )
    return {"parameters": result.trained_parameters, "steps": result.steps, **report.to_dict()}


def methods() -> dict[str, graphs.GraphConfig]:
    """Returns the graph, and a head on each of its nodes."""
    plain = graph_config()
    matched = build(plain).num_trainable()
    return {"graph": plain} | {f"head_{name}": head_config(name, matched) for name in WIDTHS}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all seeds; prints a table, and a JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    rows: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as keep:
        for method, config in methods().items():
            for seed in asked.seeds:
                found = run(config, seed, Path(keep))
                hits = sum(found["right"])
                interval = wilson(hits, found["count"])
                found |= {"interval": [interval.low, interval.high], "provenance": provenance(seed)}
                write(asked.output / f"{method}-{seed}.json", {"method": method} | found)
                rows.setdefault(method, []).append(hits)
                print(f"{method} {seed}: {hits} of {found['count']}", flush=True)
    print("| method | right of 300, by seed |\n|---|---|")
    for method, hits in rows.items():
        print(f"| {method} | {', '.join(map(str, hits))} |")
    print(json.dumps({"right": rows, "count": SIZES[2]}))


if __name__ == "__main__":
    main()
