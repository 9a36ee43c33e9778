"""`rc-agents demo`: one `generate()` over several frozen models, watched, measured and written up."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextIteratorStreamer

import rc_agents
from rc_agents import packaged
from rc_agents.demo import facts, measure, report
from rc_agents.demo import texts as held_out
from rc_agents.demo.measure import Subject
from rc_agents.provenance import provenance

ENSEMBLE = "package:demo"
SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How much the demo measures.

    Args:
        output: folder of the report.
        seed: of every draw.
        choice_codes: held-out codes for the choice among ten titles.
        documents: held-out documents of each kind for perplexity.
        length: tokens of each document.
        repeats: repeats of each timing.
        threads: torch threads; 0 leaves torch's own number.
    """

    output: Path = Path("reports/demo")
    seed: int = 0
    choice_codes: int = 15
    documents: int = 6
    length: int = 128
    repeats: int = 5
    threads: int = 0

    @classmethod
    def full(cls, output: Path, seed: int, threads: int) -> DemoConfig:
        """Everything: all held-out codes, more text; some twenty minutes on two cores."""
        return cls(
            output=output,
            seed=seed,
            threads=threads,
            choice_codes=10_000,
            documents=60,
            length=256,
            repeats=9,
        )


def run(config: DemoConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the demo and returns what it measured; writes `report.html` and `results.json` to `config.output`.

    Raises:
        PackageError: a package with the models or texts is missing; the message says which command installs it.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    began = time.perf_counter()
    config.output.mkdir(parents=True, exist_ok=True)
    splits, texts = facts.load(), {kind: _texts(kind, config) for kind in packaged.TEXTS}
    say(f"Loading three frozen models and their bridges ({ENSEMBLE}) ...")
    model = rc_agents.CoupledForCausalLM.from_pretrained(ENSEMBLE)
    say(_description(model))
    subjects = {
        "frozen anchor": Subject(model, model.tokenizer, []),
        "specialist alone": Subject(model.models["medical"], model.tokenizer),
        "ensemble": Subject(model, model.tokenizer),
    }
    results: dict[str, Any] = {"provenance": provenance(config.seed), "settings": _plain(config)}
    results["answers"] = show_answers(subjects, _sample(splits.held_out, SHOWN, config.seed), say)
    results["accuracy"] = accuracy(subjects, splits, config, say)
    results["perplexity"] = perplexities(subjects, texts, config, say)
    results["latency"] = latency(model, subjects, splits, config, say)
    results["seconds"] = round(time.perf_counter() - began, 1)
    (config.output / "results.json").write_text(
        json.dumps(results, indent=2) + "\n", encoding="utf-8"
    )
    page = report.write(results, config.output)
    say(f"\nDone in {results['seconds']:.0f} s. Report: {page}")
    return results


def show_answers(
    subjects: dict[str, Subject], chosen: Sequence[facts.Fact], say: Callable[[str], None]
) -> list[dict[str, str]]:
    """Streams the frozen anchor's and the ensemble's answers beside the right title."""
    say("\nQuestions about codes that no bridge has seen in training:")
    rows = []
    for fact in chosen:
        say(f"\n  {facts.question(fact)}   (right: {fact.title})")
        row = {"code": fact.code, "title": fact.title}
        for name in ("frozen anchor", "ensemble"):
            print(f"    {name:14} ", end="", flush=True)
            pieces = []
            for piece in stream(subjects[name], facts.qa_prompt(fact)):
                pieces.append(piece)
                print(piece.replace("\n", " "), end="", flush=True)
            row[name] = "".join(pieces).strip()
            print("   [right]" if facts.matches(row[name], fact) else "", flush=True)
        rows.append(row)
    return rows


def stream(subject: Subject, prompt: str) -> Iterator[str]:
    """Yields an answer's text as it is generated; raises what generating raised."""
    streamer = TextIteratorStreamer(subject.tokenizer, skip_prompt=True, skip_special_tokens=True)
    batch = subject.tokenizer(prompt, return_tensors="pt")

    def answer() -> None:
        try:
            subject.model.generate(**batch, **subject.settings(batch), streamer=streamer)
        finally:
            streamer.end()  # a failure must not leave the reader waiting

    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(answer)
        yield from streamer
        answering.result()


def accuracy(
    subjects: dict[str, Subject],
    splits: facts.FactSplits,
    config: DemoConfig,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Exact match on every held-out code, and choice among ten titles."""
    say(f"\nAccuracy on held-out codes (seed {config.seed}):")
    found: dict[str, Any] = {}
    sample = _sample(splits.held_out, config.choice_codes, config.seed)
    for name, subject in subjects.items():
        exact = measure.exact_match(subject, splits.held_out, label=f"exact match, {name}")
        picked = measure.choice(
            subject, sample, splits.all, seed=config.seed, label=f"choice of ten, {name}"
        )
        say(f"  {name:17} exact match {exact}")
        say(f"  {'':17} choice of 10 {picked}")
        found[name] = {"exact_match": _share(exact), "choice_of_10": _share(picked)}
    return found


def perplexities(
    subjects: dict[str, Subject],
    texts: dict[str, list[str]],
    config: DemoConfig,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Perplexity on held-out text of each kind, frozen against coupled."""
    say(
        f"\nPerplexity on held-out text ({config.documents} documents a kind, {config.length} tokens each):"
    )
    found: dict[str, Any] = {}
    for kind, documents in texts.items():
        both = {
            name: measure.perplexity(
                subjects[name], documents, length=config.length, label=f"{kind}, {name}"
            )
            for name in ("frozen anchor", "ensemble")
        }
        change = both["ensemble"].value / both["frozen anchor"].value - 1
        say(
            f"  {kind:8} frozen {both['frozen anchor'].value:7.2f}   coupled {both['ensemble'].value:7.2f}   "
            f"{100 * change:+.1f} %   ({both['ensemble'].tokens} tokens)"
        )
        found[kind] = {name: asdict(value) for name, value in both.items()} | {"change": change}
    return found


def latency(
    model: Any,
    subjects: dict[str, Subject],
    splits: facts.FactSplits,
    config: DemoConfig,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One coupled answer against asking the specialist and handing its text to the anchor."""
    chosen = _sample(splits.held_out, config.repeats, config.seed + 1)
    queue = {name: iter(chosen) for name in ("coupled", "handoff", "coupled, medical only")}
    medical = Subject(model, model.tokenizer, ["medical"])
    right = dict.fromkeys(queue, 0)

    def ask(name: str, answer: Callable[[facts.Fact], str]) -> Callable[[], None]:
        def call() -> None:
            fact = next(queue[name])
            right[name] += facts.matches(answer(fact), fact)

        return call

    calls = {
        "coupled": ask(
            "coupled", lambda fact: subjects["ensemble"].answer([facts.qa_prompt(fact)])[0]
        ),
        "coupled, medical only": ask(
            "coupled, medical only", lambda fact: medical.answer([facts.qa_prompt(fact)])[0]
        ),
        "handoff": ask(
            "handoff",
            lambda fact: measure.handoff(
                subjects["frozen anchor"], subjects["specialist alone"], fact
            ),
        ),
    }
    times = measure.seconds(calls, len(chosen))
    medians = {name: measure.median(values) for name, values in times.items()}
    say(
        f"\nTime to a finished answer (median of {len(chosen)} questions, interleaved; lockstep, one process):"
    )
    for name, value in medians.items():
        say(
            f"  {name:22} {value:6.2f} s   {value / medians['handoff']:.2f} x the handoff"
            f"   right {right[name]}/{len(chosen)}"
        )
    return {
        name: {
            "median_s": medians[name],
            "all_s": times[name],
            "right": right[name],
            "count": len(chosen),
        }
        for name in calls
    }


def _description(model: rc_agents.CoupledForCausalLM) -> str:
    lines = []
    for name, member in model.members.items():
        lines.append(f"  {name:8} {member.ref}")
    trained = sum(parameter.numel() for _, parameter in model.trainable_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    edges = ", ".join(f"{edge.source} -> {edge.target}" for edge in model.edges)
    lines.append(
        f"  bridges  {edges} after anchor blocks {[row[0] for row in model.sites]}; {trained:,} of {total:,} values"
    )
    return "\n".join(lines)


def _texts(kind: str, config: DemoConfig) -> list[str]:
    return [record.key for record in held_out.split(kind).test[: config.documents]]


def _sample(chosen: Sequence[facts.Fact], count: int, seed: int) -> list[facts.Fact]:
    return random.Random(seed).sample(list(chosen), min(count, len(chosen)))


def _share(share: measure.Share) -> dict[str, Any]:
    return {
        "value": share.value,
        "hits": share.hits,
        "count": share.count,
        "wilson_95": share.interval,
    }


def _plain(config: DemoConfig) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(config).items()
    }
