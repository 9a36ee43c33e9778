"""A frozen language model answers what a picture shows: `make bench-multimodal`; a table and a JSON line last.

The frozen anchor (SmolLM2-135M) reads "What does the picture show? Answer:" and never sees a pixel; a small vision
transformer, trained from scratch on drawn shapes and frozen, speaks to it over trained bridges. The same pictures go to
the anchor alone, to the ensemble with the pictures of the batch exchanged (`shuffled`), and to a linear probe on the
encoder's states (`probe`), the ceiling for what there is to be read. Two measures, by picture:

- `choice`: the caption of the highest log-probability of all is right (chance is 1 in 48);
- `generation`: the greedy answer is the caption, letter by letter.

Both on pictures of combinations of colour and shape that the bridges were trained on (`seen`) and never met (`unseen`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks import files
from rc_agents.benchmarks.pictures import COLOURS, SHAPES, Counts, Pictures, Splits, splits
from rc_agents.benchmarks.scores import Score
from rc_agents.benchmarks.small_eye import Probe, trained_eye
from rc_agents.benchmarks.statistics import wilson
from torch import Tensor
from transformers import ViTModel

import rc_agents
from rc_agents.provenance import provenance
from rc_agents.training.bridges import TrainConfig, train
from rc_agents.training.data import Pair

ANCHOR = "package:smollm2-135m"
PROMPT = "What does the picture show? Answer:"
SITES = [{"anchor": block, "eye": 3} for block in (20, 24, 28)]
METHODS = ("coupled", "anchor", "probe", "shuffled")
OUTPUT = Path("benchmarks/results/multimodal")
ROWS = 40  # pictures a pass
CONFIG = TrainConfig(
    steps=100,
    batch_size=24,
    learning_rate=3e-3,
    gate_learning_rate=2e-2,
    eval_steps=20,
    log_steps=20,
)


def couple(eye: ViTModel, anchor: Any = ANCHOR, sites: Any = SITES) -> rc_agents.CoupledForCausalLM:
    """Couples the eye to the anchor; new bridges say nothing."""
    bridge = rc_agents.BridgeConfig(gate_init=0.0)
    return rc_agents.couple(
        anchor,
        {"eye": eye},
        topology="unilateral",
        bridge=bridge,
        sites=sites,
        dtype="float32",
    )


def pairs(pictures: Pictures, part: str) -> list[Pair]:
    """The prompt, the caption, and what the eye is shown."""
    rows = zip(pictures.captions(), pictures.pixels, strict=True)
    return [
        Pair(
            PROMPT,
            f" {caption}",
            origin=f"{part} {number}",
            sources={"eye": {"pixel_values": pixels[None]}},
        )
        for number, (caption, pixels) in enumerate(rows)
    ]


# Answers.


def tokens_of(tokenizer: Any) -> list[list[int]]:
    """Returns what an answer is made of, position by position: " a", a colour, a shape, each one token."""
    levels = [["a"], list(COLOURS), list(SHAPES)]
    found = [
        [tokenizer.encode(f" {word}", add_special_tokens=False) for word in one] for one in levels
    ]
    longer = [ids for level in found for ids in level if len(ids) != 1]
    if longer:
        raise ValueError(f"each word of a caption is one token of the anchor's, got {longer[0]}")
    return [[ids[0] for ids in level] for level in found]


@torch.inference_mode()
def log_probabilities(
    model: Any, prompt: Tensor, levels: Sequence[Sequence[int]], sources: Any
) -> Tensor:
    """Returns the log-probability of every answer after a prompt, (B, ways of level 1, of level 2, ...).

    Each level is one cached step over all answers so far, so that what they share runs once.

    Args:
        model: an ensemble.
        prompt: (B, T) tokens, without padding.
        levels: the tokens that an answer may have at each of its positions.
        sources: what the encoder is shown.
    """
    output = model(prompt, sources=sources, use_cache=True, logits_to_keep=1)
    total = torch.zeros(len(prompt), 1)
    for depth, tokens in enumerate(levels):
        step = output.logits[:, -1].float().log_softmax(-1)[:, tokens]  # (B x answers so far, ways)
        total = (total.reshape(-1, 1) + step).reshape(len(prompt), -1)
        if depth + 1 < len(levels):
            memory = output.past_key_values
            memory.batch_repeat_interleave(len(tokens))
            ids = torch.tensor(tokens).repeat(len(step))[:, None]
            output = model(ids, past_key_values=memory, use_cache=True)
    return total.reshape(len(prompt), *(len(level) for level in levels))


def answers(model: Any, pictures: Pictures, shown: Tensor | None) -> tuple[list[bool], list[bool]]:
    """Returns for each picture whether the choice and the greedy answer are right.

    Args:
        model: the ensemble.
        pictures: what is asked about.
        shown: the pixels that the eye gets, (N, 3, SIZE, SIZE); None for no picture at all.
    """
    levels = tokens_of(model.tokenizer)
    prompt = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    chosen, written = [], []
    for pixels in [None] if shown is None else shown.split(ROWS):  # one row tells all without
        sources = None if pixels is None else {"eye": {"pixel_values": pixels}}
        ids = prompt if pixels is None else prompt.repeat(len(pixels), 1)
        scores = log_probabilities(model, ids, levels, sources).flatten(1)
        chosen += scores.argmax(1).tolist()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            sources=sources,
            max_new_tokens=5,
            do_sample=False,
        )
        texts = model.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        written += [text.strip() for text in texts]
    copies = len(pictures) // len(chosen)
    wanted = (pictures.labels[:, 0] * len(SHAPES) + pictures.labels[:, 1]).tolist()
    right = [a == b for a, b in zip(chosen * copies, wanted, strict=True)]
    return right, [a == b for a, b in zip(written * copies, pictures.captions(), strict=True)]


def shuffled(pictures: Pictures, seed: int) -> Tensor:
    """Returns the pixels in an order in which every picture stands at another's place."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    pixels = torch.empty_like(pictures.pixels)
    pixels[order] = pictures.pixels[order.roll(1)]
    return pixels


# A seed.


def run(
    seed: int,
    output: Path,
    *,
    config: TrainConfig = CONFIG,
    counts: Counts | None = None,
    anchor: Any = ANCHOR,
) -> None:
    """Trains an eye and bridges for it, asks all methods, and writes one file each."""
    made, parts = provenance(seed), splits(seed, counts)
    begun = time.perf_counter()
    eye = trained_eye(parts.eye, seed)
    spent = {"eye": round(time.perf_counter() - begun, 1)}
    about: dict[str, Any] = {
        "counts": {name: len(one) for name, one in vars(parts).items()},
        "seconds": spent,
    }
    about["provenance"] = made
    probe = Probe(eye, parts.train)
    write(output, "probe", seed, about, parts, lambda part: [_both(probe, part)] * 2)
    torch.manual_seed(seed)
    model = couple(eye, anchor)
    before = model.base_fingerprint()
    begun = time.perf_counter()
    settings = TrainConfig(**{**vars(config), "seed": seed})
    with tempfile.TemporaryDirectory() as states:  # the anchor's lower blocks run once a caption
        result = train(
            model,
            pairs(parts.train, "train"),
            config=settings,
            validation=pairs(parts.validation, "validation"),
            states=states,
        )
    assert model.base_fingerprint() == before
    spent["bridges"] = round(time.perf_counter() - begun, 1)
    about |= {
        "steps": result.steps,
        "trained_parameters": result.trained_parameters,
        "validation": [[one["step"], round(one["eval_loss"], 4)] for one in result.evaluations],
        "sites": model.sites,
        "config": {key: value for key, value in vars(settings).items() if value is not None},
    }
    asked: dict[str, Callable[[Pictures], Any]] = {
        "coupled": lambda part: answers(model, part, part.pixels),
        "anchor": lambda part: answers(model, part, None),
        "shuffled": lambda part: answers(model, part, shuffled(part, seed)),
    }
    for method, ask in asked.items():
        write(output, method, seed, about, parts, ask)


def _both(probe: Probe, part: Pictures) -> list[bool]:
    return (probe.read(part) == part.labels).all(1).tolist()


def write(
    output: Path,
    method: str,
    seed: int,
    about: dict[str, Any],
    parts: Splits,
    ask: Callable[[Pictures], Any],
) -> None:
    """Asks a method about both test sets and writes its file."""
    begun = time.perf_counter()
    scores = {}
    for name, part in (("seen", parts.test), ("unseen", parts.unseen)):
        for measure, values in zip(("choice", "generation"), ask(part), strict=True):
            scores[f"{name}/{measure}"] = Score(values=[float(one) for one in values]).to_dict()
    record = {"benchmark": "multimodal", "method": method, "seed": seed, **about, "scores": scores}
    record["asking_seconds"] = round(time.perf_counter() - begun, 1)
    files.write(output / f"{method}-{seed}.json", record)
    print(method, seed, {key: share(one) for key, one in scores.items()}, flush=True)


# The table.


def share(score: dict[str, Any]) -> float:
    """Returns the share of right answers in a score."""
    return round(score["values"].count("1") / len(score["values"]), 4)


def table(output: Path) -> list[dict[str, Any]]:
    """Returns a row for each method and set: hits, items and Wilson's interval in percent, over all seeds."""
    rows = []
    for method in METHODS:
        records = [files.read(path) for path in sorted(output.glob(f"{method}-*.json"))]
        for key in records[0]["scores"] if records else ():
            if method == "probe" and key.endswith("generation"):
                continue  # it reads labels and writes no text
            values = [one["scores"][key]["values"] for one in records]
            hits, count = "".join(values).count("1"), sum(map(len, values))
            found = wilson(hits, count)
            row: dict[str, Any] = {"method": method, "set": key, "hits": hits, "items": count}
            row |= {name: round(100 * getattr(found, name), 1) for name in ("value", "low", "high")}
            row["seeds"] = [round(100 * one.count("1") / len(one), 1) for one in values]
            rows.append(row)
    return rows


def report(output: Path) -> str:
    """Returns the table as Markdown."""
    lines = ["| method | set / measure | right | 95 % | by seed |", "|---|---|---|---|---|"]
    for row in table(output):
        by_seed = ", ".join(f"{one:.1f}" for one in row["seeds"])
        lines.append(
            f"| {row['method']} | {row['set']} | {row['hits']} of {row['items']}, {row['value']:.1f} % "
            f"| {row['low']:.1f} to {row['high']:.1f} | {by_seed} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the seeds that are missing, prints the table, and the rows as a JSON line last."""
    parser = argparse.ArgumentParser(description="What does the picture show?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--report", action="store_true", help="print the table alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in () if arguments.report else arguments.seeds:
        if not all((arguments.output / f"{one}-{seed}.json").exists() for one in METHODS):
            run(seed, arguments.output)
    print(report(arguments.output))
    print(json.dumps(table(arguments.output)))


if __name__ == "__main__":
    main()
