"""What sleeping specialists spare and cost: `make bench-sparse`, a table, and JSON in results/speed/sparse.json.

The packaged ensemble (three SmolLM2-135M, gates that read both ends) is asked with everybody awake and under each
setting:

`exact match`   held-out ICD-10-CM codes, each answer read as the demo does;
`same answers`  general questions whose greedy answer has the very tokens of the dense one;
`perplexity`    of the tokens behind a short prompt, fed one by one, over the dense one's, on held-out general text and
                Python, and on text that switches from general to Python or to held-out codes while it is decoded;
`skipped`       share of (decoded token, specialist) pairs at which the specialist slept, over all of these;
`time`          processor time of dense answers over sparse ones, medians of interleaved rounds, one row at a time: a
                code, a general question, and Python to go on with.

Every answer is greedy; the seed draws the codes. What the file has already, with the same counts, is not measured
again, so a killed run goes on; delete the file to measure all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks import files

import rc_agents
from rc_agents import Sparse
from rc_agents.demo import facts, measure, texts
from rc_agents.demo.measure import Subject
from rc_agents.provenance import provenance
from rc_agents.training.sleep import decoded_losses

OUTPUT = Path(__file__).parent / "results" / "speed" / "sparse.json"
SETTINGS: dict[str, Sparse | None] = {
    "dense": None,
    "wake 1": Sparse(wake=1.0),
    "wake 0.01": Sparse(wake=0.01),
    "wake 0.002": Sparse(wake=0.002),
    "wake 0.01, certainty 0.3": Sparse(certainty=0.3),
}
TIMED = ("wake 1", "wake 0.01", "wake 0.01, certainty 0.3")
KINDS = ("general", "python", "switched")
BEFORE = 100  # characters of general text before a switch


def asleep(model: Any, settings: Sparse | None) -> Any:
    """Returns the context of a setting; it yields the counts."""
    return nullcontext() if settings is None else model.sparse(settings)


def answers(model: Any, questions: Sequence[str], tokens: int) -> list[list[int]]:
    """Greedy answers of so many tokens, a batch at once."""
    batch = model.tokenizer(list(questions), return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(
        **batch,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    return [row.tolist() for row in ids[:, batch["input_ids"].shape[1] :]]


def documents(kind: str) -> list[str]:
    """Held-out texts of a kind."""
    if kind != "switched":
        return [record.key for record in texts.split(kind).test]
    codes = [facts.statement(fact) for fact in facts.load().held_out]
    ahead = [" ".join(codes[at : at + 8]) for at in range(0, len(codes), 8)]
    each = zip(documents("general"), documents("python"), ahead, strict=False)
    return [f"{text[:BEFORE]}\n\n{end}" for text, *ends in each for end in ends]


def rows(model: Any, kind: str, count: int, length: int) -> torch.Tensor:
    """The first so many tokens of as many texts of a kind, (B, T)."""
    found: list[torch.Tensor] = []
    for text in documents(kind):
        row = model.tokenizer(text, return_tensors="pt", truncation=True, max_length=length)
        if row.input_ids.shape[1] == length:
            found.append(row.input_ids)
        if len(found) == count:
            break
    return torch.cat(found)


def quality(model: Any, settings: Sparse | None, data: dict[str, Any]) -> dict[str, Any]:
    """What is measured under one setting."""
    with asleep(model, settings) as spared:
        exact = measure.exact_match(Subject(model, model.tokenizer), data["codes"], batch=20)
        said = answers(model, data["questions"], data["tokens"])
        losses = {kind: decoded_losses(model, data[kind], data["prompt"]) for kind in KINDS}
    found = {
        "exact_match": {"hits": exact.hits, "count": exact.count, "interval": exact.interval},
        "said": said,
        "loss": {kind: one.mean().item() for kind, one in losses.items()},
        "provenance": provenance(data["seed"]),
    }
    if spared is not None:
        found |= {
            "tokens": dict(spared.tokens),
            "skipped": dict(spared.skipped),
            "caught_up": dict(spared.caught_up),
            "repeated": spared.repeated,
            "share": spared.share,
        }
    return found


def processor_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each call, interleaved, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                times[name].append(time.process_time() - start)
    return times


def timed(model: Any, prompt: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Dense over sparse processor time of one answer, by setting: median, lowest and highest round."""

    def call(name: str) -> None:
        with asleep(model, SETTINGS[name]):
            answers(model, [prompt], tokens)

    times = processor_seconds({n: lambda n=n: call(n) for n in ("dense", *TIMED)}, rounds)
    dense = times.pop("dense")
    return {
        name: {
            "ratio": statistics.median(dense) / statistics.median(own),
            "low": min(a / b for a, b in zip(dense, own, strict=True)),
            "high": max(a / b for a, b in zip(dense, own, strict=True)),
        }
        for name, own in times.items()
    }


def prompts(model: Any, data: dict[str, Any]) -> dict[str, str]:
    """What is asked where time is taken."""
    return {
        "code": facts.qa_prompt(data["codes"][0]),
        "general": data["questions"][0],
        "python": model.tokenizer.decode(data["python"][0, : data["prompt"]]),
    }


def table(record: dict[str, Any]) -> str:
    """Returns the results as a Markdown table."""
    count, lines = record["counts"], []
    texts_of = "perplexity, general | python | switched | time, code | general | python"
    lines.append(f"| | skipped | exact match | same answers | {texts_of} |")
    lines.append("|" + "---|" * 10)
    for name, one in record["settings"].items():
        exact = f"{one['exact_match']['hits']}/{one['exact_match']['count']}"
        dense = record["settings"]["dense"]["loss"]
        rise = [f"{100 * math.expm1(one['loss'][kind] - dense[kind]):+.2f} %" for kind in KINDS]
        fast = [one_prompt.get(name) for one_prompt in record["time"].values()]
        shown = [f"{f['ratio']:.2f} ({f['low']:.2f} to {f['high']:.2f})" if f else "" for f in fast]
        share = f"{100 * one['share']:.0f} %" if "share" in one else ""
        same = f"{one['same']}/{count['questions']}"
        lines.append(f"| {' | '.join([name, share, exact, same, *rise, *shown])} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints a table and writes the file."""
    parser = argparse.ArgumentParser(description="What sleeping specialists spare and cost.")
    parser.add_argument("--codes", type=int, default=20)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = {
        key: getattr(arguments, key)
        for key in ("codes", "questions", "documents", "prompt", "length", "tokens", "rounds")
    }
    record: dict[str, Any] = {"benchmark": "sparse", "counts": counts, "settings": {}, "time": {}}
    if arguments.output.is_file() and files.read(arguments.output)["counts"] == counts:
        record = files.read(arguments.output)
    model = rc_agents.CoupledForCausalLM.from_pretrained("package:demo")
    held_out = list(facts.load().held_out)
    data: dict[str, Any] = {
        "codes": random.Random(arguments.seed).sample(held_out, arguments.codes),
        "questions": [f"Question: {q}?\nAnswer:" for q in texts.questions(arguments.questions)],
        "tokens": arguments.tokens,
        "prompt": arguments.prompt,
        "seed": arguments.seed,
        **{kind: rows(model, kind, arguments.documents, arguments.length) for kind in KINDS},
    }
    for name, settings in SETTINGS.items():
        if name not in record["settings"]:
            one = record["settings"][name] = quality(model, settings, data)
            said = record["settings"]["dense"]["said"]
            one["same"] = sum(a == b for a, b in zip(one["said"], said, strict=True))
            print(name, {key: value for key, value in one.items() if key != "said"}, flush=True)
            files.write(arguments.output, record)
    for kind, prompt in prompts(model, data).items():
        if kind not in record["time"]:
            record["time"][kind] = timed(model, prompt, arguments.tokens, arguments.rounds)
            print(kind, record["time"][kind], flush=True)
            files.write(arguments.output, record)
    record["provenance"] = provenance(arguments.seed)
    files.write(arguments.output, record)
    print(table(record))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
