"""What a training step costs: `make bench-train`, interleaved medians, peak memory, a JSON line last.

SmolLM2-135M (float32, one intra-op thread) as the anchor and as every specialist, bridges on a unilateral topology; a
step is forward, backward and AdamW on rows of text of which only the last tokens are labelled, as answers are.

`plain`     every model runs, logits of all positions
`labelled`  every model runs, logits of the labelled positions alone: what training does by itself
`cached`    the specialists' states, and the anchor's below the first site, come from disk: `train(..., states=)`
`lora`      PEFT LoRA on the anchor alone, with as many trained parameters as the bridges of one specialist
`lora, labelled`   the same with logits of the labelled positions alone

Memory is the peak of a process of its own above what it had with all models loaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.memory import CLEAR, high_water, resident
from rc_agents.benchmarks.speed import interleaved
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import rc_agents
from rc_agents import packaged
from rc_agents.provenance import provenance
from rc_agents.training.data import Encoded
from rc_agents.training.items import batch_of
from rc_agents.training.labelled import only_at, predicting
from rc_agents.training.passes import Batch, WholePass, targets
from rc_agents.training.replay import ReplayPass

BRIDGES, LORA = ("plain", "labelled", "cached"), ("lora", "lora, labelled")


@dataclass
class Case:
    """One way to train: its step, and how many values it trains."""

    step: Callable[[], None]
    parameters: int


def stepping(parameters: Sequence[nn.Parameter], loss: Callable[[], torch.Tensor]) -> Case:
    """Returns the case of a loss and what it trains."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Case(step, sum(parameter.numel() for parameter in parameters))


def examples(rows: int, tokens: int, answer: int, vocabulary: int) -> list[Encoded]:
    """Random rows of which the last `answer` tokens are labelled."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, vocabulary, (rows, tokens), generator=generator)
    return [Encoded(tuple(row), tokens - answer, "") for row in ids.tolist()]


def bridges(kind: str, model: rc_agents.CoupledForCausalLM, data: list[Encoded]) -> Case:
    """Training the bridges of an ensemble in one of three ways."""
    batch = batch_of(data, range(len(data)), "data")
    parameters = [parameter for _, parameter in model.trainable_parameters()]
    if kind == "plain":
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        return stepping(parameters, lambda: model(**inputs).loss)
    if kind == "labelled":
        runner: Any = WholePass(model)
    else:
        folder = tempfile.TemporaryDirectory()
        runner = ReplayPass(model, {"data": data}, folder.name, progress=False)
        runner.folder = folder  # as long as the pass lives
    return stepping(parameters, lambda: cross_entropy(runner.logits(batch), targets(batch)))


def lora(kind: str, place: Path, wanted: int, data: list[Encoded]) -> Case:
    """Training LoRA on the anchor alone, of the rank that comes next to `wanted` parameters."""
    from peft import LoraConfig, get_peft_model

    def adapted(rank: int) -> Any:
        base = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(base, config)

    def trained(model: Any) -> list[nn.Parameter]:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    one = sum(parameter.numel() for parameter in trained(adapted(1)))
    model = adapted(max(1, round(wanted / one)))
    batch = batch_of(data, range(len(data)), "data")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if kind == "lora":
        return stepping(trained(model), lambda: model(**inputs, labels=batch["labels"]).loss)

    def loss(batch: Batch = batch) -> torch.Tensor:
        with only_at(model.get_base_model(), predicting(batch["labels"])):
            logits_PV = model(**inputs, use_cache=False).logits[0]
        return cross_entropy(logits_PV, targets(batch))

    return stepping(trained(model), loss)


@dataclass
class Loaded:
    """What every case is made of."""

    place: Path
    models: list[Any]
    tokenizer: Any

    @classmethod
    def of(cls, name: str, count: int) -> Loaded:
        """Loads `count` copies of a model."""
        place = Path(packaged.resolve(name)) if packaged.is_packaged(name) else Path(name)
        models = [
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32) for _ in range(count)
        ]
        return cls(place, models, AutoTokenizer.from_pretrained(place))


def cases(
    names: Sequence[tuple[str, int]], loaded: Loaded, arguments: argparse.Namespace
) -> dict[str, Case]:
    """Builds the cases by name; all ensembles share their models."""
    models = loaded.models
    data = examples(arguments.rows, arguments.tokens, arguments.answer, models[0].config.vocab_size)
    wanted = arguments.sites * models[0].config.hidden_size ** 2
    made = {}
    for kind, count in names:
        if kind in LORA:
            made[kind] = lora(kind, loaded.place, wanted, data)
            continue
        named = {f"s{number}": model for number, model in enumerate(models[1:count], 1)}
        ensemble = rc_agents.couple(
            models[0],
            named,
            topology="unilateral",
            sites=arguments.sites,
            alignment="shared",
            tokenizers=dict.fromkeys(("anchor", *named), loaded.tokenizer),
        )
        made[f"{kind} {count}"] = bridges(kind, ensemble, data)
    return made


def peak_of_a_step(
    name: tuple[str, int], loaded: Loaded, arguments: argparse.Namespace, found: Any
) -> None:
    """Puts into the queue how many bytes three steps need above the loaded models; in a process of its own."""
    (case,) = cases([name], loaded, arguments).values()
    before = resident()
    for _ in range(3):
        case.step()
    found.put(high_water() - before)


def measured_apart(
    name: tuple[str, int], loaded: Loaded, arguments: argparse.Namespace
) -> int | None:
    """Runs `peak_of_a_step` in a fork of this process; None where the system does not tell (it needs Linux)."""
    if not CLEAR.exists():
        return None
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    process = context.Process(target=peak_of_a_step, args=(name, loaded, arguments, found))
    process.start()
    process.join()
    return int(found.get()) if process.exitcode == 0 else None


def main() -> None:
    """Prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description="Time training steps of bridges and of LoRA.")
    parser.add_argument("--model", default="package:smollm2-135m", help="path or package:NAME")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answer", type=int, default=8, help="labelled tokens of a row")
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 3, 4], help="models")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [(kind, count) for count in arguments.counts for kind in BRIDGES]
    names += [(kind, 1) for kind in LORA]
    loaded = Loaded.of(arguments.model, max(arguments.counts))
    peaks = {name: measured_apart(name, loaded, arguments) for name in names}
    made = cases(names, loaded, arguments)
    times = interleaved({name: case.step for name, case in made.items()}, arguments.repeats)
    base = statistics.median(times["lora"])
    rows = []
    for kind, count in names:
        name = kind if kind in LORA else f"{kind} {count}"
        seconds = statistics.median(times[name])
        rows.append(
            {
                "case": name,
                "parameters": made[name].parameters,
                "seconds": seconds,
                "against_lora": seconds / base,
                "peak_bytes": peaks[kind, count],
            }
        )
    print(f"{'case':15} {'trained':>10} {'seconds':>8} {'of lora':>8} {'peak MB':>8}")
    for row in rows:
        print(
            f"{row['case']:15} {row['parameters']:10,} {row['seconds']:8.3f} {row['against_lora']:8.2f} "
            f"{(row['peak_bytes'] or 0) / 2**20:8.0f}"
        )
    record = {"benchmark": "train", "settings": vars(arguments), "rows": rows, **provenance(0)}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
