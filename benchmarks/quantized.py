"""What fewer bits cost and gain: `python -m rc_agents.benchmarks.quantized`, a table, a JSON line last.

The model in float32, in bfloat16 and in dynamic int8 reads the same held-out documents: perplexity over all tokens, its
ratio to float32's with a paired bootstrap interval over documents, and seconds for a pass of so many tokens and for one
decoded token behind them, interleaved, medians.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from typing import Any

import torch
from rc_agents.benchmarks.speed import interleaved
from torch import Tensor

import rc_agents
from rc_agents import packaged
from rc_agents.provenance import provenance

FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
}
"""What `rc_agents.couple` is given for each."""
DRAWS = 2000


def losses(model: rc_agents.CoupledForCausalLM, rows: list[Tensor]) -> list[float]:
    """Mean loss of each document in nats a token."""
    with torch.inference_mode():
        return [model(input_ids=row, labels=row).loss.float().item() for row in rows]


def ratio(base: list[float], other: list[float], seed: int) -> dict[str, float]:
    """How much larger the other's perplexity is, with a 95 % interval over documents."""
    differences = [b - a for a, b in zip(base, other, strict=True)]
    draw = random.Random(seed)
    means = sorted(
        statistics.mean(draw.choices(differences, k=len(differences))) for _ in range(DRAWS)
    )
    low, high = means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS)]
    return {
        "ratio": math.exp(statistics.mean(differences)),
        "low": math.exp(low),
        "high": math.exp(high),
    }


def times(models: dict[str, Any], row: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of a pass and of one decoded token behind it."""
    caches = {
        name: model(input_ids=row, use_cache=True).past_key_values for name, model in models.items()
    }

    def step(name: str) -> None:
        models[name](input_ids=row[:, :1], past_key_values=caches[name], use_cache=True)
        caches[name].crop(-1)

    passes = interleaved({n: lambda n=n: models[n](input_ids=row) for n in models}, repeats)
    steps = interleaved({n: lambda n=n: step(n) for n in models}, repeats)
    return {
        name: {"pass": statistics.median(passes[name]), "step": statistics.median(steps[name])}
        for name in models
    }


def main() -> None:
    """Prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description="Perplexity and speed of a model in fewer bits.")
    parser.add_argument("--model", default="package:smollm2-135m", help="id, path or package:NAME")
    parser.add_argument("--kind", default="general", help="kind of packaged text")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = list(dict.fromkeys(["float32", *arguments.forms]))
    models = {name: rc_agents.couple(arguments.model, **FORMS[name]) for name in names}
    texts = packaged.text(arguments.kind)[-20 * arguments.documents :]
    encoded = [models["float32"].tokenizer(text, return_tensors="pt").input_ids for text in texts]
    rows = [row[:, : arguments.tokens] for row in encoded if row.shape[1] >= arguments.tokens]
    rows = rows[: arguments.documents]
    read = {name: losses(model, rows) for name, model in models.items()}
    with torch.inference_mode():
        spent = times(models, rows[0], arguments.repeats)
    found = [
        {
            "form": name,
            "perplexity": math.exp(statistics.mean(read[name])),
            **ratio(read["float32"], read[name], arguments.seed),
            **{kind: spent[name][kind] for kind in ("pass", "step")},
            **{
                f"{kind}_speedup": spent["float32"][kind] / spent[name][kind]
                for kind in ("pass", "step")
            },
        }
        for name in models
    ]
    print(
        f"{'form':9} {'perplexity':>10} {'ratio':>7} {'95 % interval':>16} {'pass':>7} {'step':>7}"
    )
    for one in found:
        interval = f"{one['low']:.4f}-{one['high']:.4f}"
        print(
            f"{one['form']:9} {one['perplexity']:10.3f} {one['ratio']:7.4f} {interval:>16} "
            f"{one['pass_speedup']:6.2f}x {one['step_speedup']:6.2f}x"
        )
    record = {
        "benchmark": "quantized",
        "settings": vars(arguments),
        "documents": len(rows),
        "forms": found,
        **provenance(arguments.seed),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
