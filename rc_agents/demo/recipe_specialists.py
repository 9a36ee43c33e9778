"""The recipe of the shipped specialists: `python -m rc_agents.demo.recipe_specialists medical`, or `python`.

Each is a LoRA adapter over SmolLM2-135M, trained with `rc_agents.training.specialize` on one processor
in about half an hour. Its figures, beside those of the frozen base, go into `metrics.json` next to it.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import TrainerCallback

from rc_agents import packaged
from rc_agents.demo import facts, measure, texts
from rc_agents.provenance import provenance
from rc_agents.training import data
from rc_agents.training.adapter_files import save_adapter
from rc_agents.training.adapter_trainer import packed_logits
from rc_agents.training.specialize import SpecializeConfig, load_base, specialize

BASE = "package:smollm2-135m"
SEED = 0
MEDICAL = SpecializeConfig(
    frozen_blocks=20,
    rank=16,
    alpha=32,
    steps=3000,
    learning_rate=4e-3,
    warmup=0.02,
    batch_size=8,
    max_length=96,
    text_batch_size=4,
    block_length=64,
    mix={"plain": 0.62, "statement": 0.12, "chat": 0.22, data.TEXT_GROUP: 0.04},
    dtype="float32",
    seed=SEED,
    save_steps=100,
)
PYTHON = SpecializeConfig(
    rank=8,
    alpha=16,
    steps=100,
    learning_rate=1e-3,
    text_batch_size=2,
    block_length=256,
    dtype="float32",
    seed=SEED,
    save_steps=50,
)
PERPLEXITY_DOCUMENTS = 40
PERPLEXITY_TOKENS = 256  # the first of each document


def medical_records(tokenizer: Any) -> list[data.Record]:
    """Returns every fact as question, sentence and chat, and some general text to keep the English."""
    records: list[data.Record] = []
    for fact in facts.load().all:
        before, after = facts.statement(fact).split(f" {fact.title}", 1)
        records += [
            data.Pair(facts.qa_prompt(fact), facts.qa_answer(fact), "plain"),
            data.Pair(before, f" {fact.title}{after}", "statement"),
            data.Pair(facts.chat_prompt(tokenizer, fact), fact.title, "chat"),
        ]
    return records + texts.split("general").train[:400]


def python_records(tokenizer: Any) -> list[data.Record]:
    """Returns the standard library's training modules."""
    return texts.split("python").train


class Watch(TrainerCallback):
    """Leaves a copy of the adapter in a folder every so many steps, and prints what it recalls."""

    def __init__(self, tokenizer: Any, folder: Path, first_block: int, every: int = 200) -> None:
        self.tokenizer, self.folder, self.first_block, self.every = (
            tokenizer,
            folder,
            first_block,
            every,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Does so when the step's number says it is time."""
        if state.global_step % self.every:
            return
        save_adapter(kwargs["model"], self.folder, base=BASE, first_block=self.first_block)
        sample, saved = facts.load().all[::10], load_specialist(self.folder)
        shares = {
            form: round(recalled(saved, self.tokenizer, sample, form), 3)
            for form in ("plain", "chat")
        }
        print(
            json.dumps({"step": state.global_step, "recalled": shares, "of": len(sample)}),
            flush=True,
        )


@torch.inference_mode()
def recalled(model: Any, tokenizer: Any, chosen: Sequence[facts.Fact], form: str) -> float:
    """Returns the share of facts whose every answer token is the likeliest given those before it.

    One pass over all of them, so that training can be watched; `exact_match` generates.
    """
    pairs = [
        data.Pair(facts.qa_prompt(fact), facts.qa_answer(fact))
        if form == "plain"
        else data.Pair(facts.chat_prompt(tokenizer, fact), fact.title)
        for fact in chosen
    ]
    examples = data.encode(tokenizer, pairs, max_length=128, block_length=128)
    batch = data.pack(examples)
    right = packed_logits(model, batch).argmax(-1) == batch["targets"]
    lengths = [len(example.ids) - example.answer_start for example in examples]
    return sum(bool(part.all()) for part in right.split(lengths)) / len(examples)


def load_specialist(folder: Path) -> Any:
    """Returns the base with an adapter merged into it."""
    return (
        peft.PeftModel.from_pretrained(load_base(BASE, "float32")[0], folder)
        .merge_and_unload()
        .eval()
    )


def exact_match(subject: measure.Subject, form: str) -> dict[str, Any]:
    """Returns the share of generated answers that are the title, normalised, for each split of the facts."""
    splits = facts.load()
    shares = {}
    for name in facts.SPLIT_SIZES:
        chosen = getattr(splits, name)
        if form == "plain":
            share = measure.exact_match(subject, chosen, label=f"{form} {name}")
        else:
            share = _chat_match(subject, chosen)
        shares[name] = {"share": round(share.value, 4), "hits": share.hits, "of": share.count}
    return shares


def _chat_match(
    subject: measure.Subject, chosen: Sequence[facts.Fact], size: int = 32
) -> measure.Share:
    hits = 0
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        answers = subject.answer([facts.chat_prompt(subject.tokenizer, fact) for fact in part])
        hits += sum(facts.matches(answer, fact) for answer, fact in zip(answers, part, strict=True))
    return measure.Share(hits, len(chosen))


def perplexities(subject: measure.Subject) -> dict[str, Any]:
    """Returns the perplexity on the first held-out documents of each kind of text."""
    found = {}
    for kind in packaged.TEXTS:
        documents = [record.key for record in texts.split(kind).test[:PERPLEXITY_DOCUMENTS]]
        found[kind] = dataclasses.asdict(
            measure.perplexity(
                subject, documents, length=PERPLEXITY_TOKENS, label=f"{kind} perplexity"
            )
        )
    return found


def medical_figures(subject: measure.Subject) -> dict[str, Any]:
    """Returns what is measured of the medical specialist, and of the base for comparison."""
    return {
        "exact_match_plain": exact_match(subject, "plain"),
        "exact_match_chat": exact_match(subject, "chat"),
        "perplexity": perplexities(subject),
    }


def python_figures(subject: measure.Subject) -> dict[str, Any]:
    """Returns what is measured of the Python specialist, and of the base for comparison."""
    return {"perplexity": perplexities(subject)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a specialist is called, how it is trained and what is measured of it."""

    name: str
    config: SpecializeConfig
    records: Callable[[Any], list[data.Record]]
    figures: Callable[[measure.Subject], dict[str, Any]]


RECIPES = {
    "medical": Recipe("medical-coding", MEDICAL, medical_records, medical_figures),
    "python": Recipe("python", PYTHON, python_records, python_figures),
}


def train(
    recipe: Recipe, output: Path, *, snapshots: Path | None = None, resume: bool = False
) -> None:
    """Trains a specialist into `output`.

    Args:
        recipe: which.
        output: folder of the adapter.
        snapshots: folder for a copy of the adapter during training.
        resume: go on from the last checkpoint.
    """
    _, tokenizer = load_base(BASE, "float32")
    watch = (
        [Watch(tokenizer, snapshots / recipe.name, recipe.config.frozen_blocks)]
        if snapshots
        else []
    )
    records = recipe.records(tokenizer)
    done = specialize(BASE, records, output, recipe.config, callbacks=watch, resume=resume)
    figures = {"steps": done.steps, "loss": done.loss, "seconds": round(done.seconds)}
    _write(output, {"training": figures | {"parameters": done.trained_parameters}})


def measure_all(recipe: Recipe, output: Path) -> None:
    """Adds figures of the adapter in `output`, as saved, and of the frozen base to its `metrics.json`."""
    _write(output, _described(recipe))
    base, tokenizer = load_base(BASE, "float32")
    for name, model in (("specialist", load_specialist(output)), ("frozen_base", base)):
        figures = recipe.figures(measure.Subject(model, tokenizer))
        print(json.dumps({name: figures}), flush=True)
        _write(output, {name: figures})


def _described(recipe: Recipe) -> dict[str, Any]:
    """Returns what the figures were made of and with."""
    return {
        "made_by": "python -m rc_agents.demo.recipe_specialists",
        "base": {"name": BASE, "fingerprint": packaged.fingerprint(BASE)},
        "config": dataclasses.asdict(recipe.config),
        "facts": {
            "seed": facts.SEED,
            **facts.SPLIT_SIZES,
            "taught": sum(facts.SPLIT_SIZES.values()),
        },
        "text": {
            "split_seed": texts.SEED,
            "test_share": texts.TEST_SHARE,
            "held_out_documents": PERPLEXITY_DOCUMENTS,
            "first_tokens": PERPLEXITY_TOKENS,
        },
        "provenance": provenance(SEED),
    }


def _write(output: Path, figures: dict[str, Any]) -> None:
    path = output / "metrics.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(known | figures, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Runs the recipe from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("specialist", choices=sorted(RECIPES))
    parser.add_argument(
        "--output", type=Path, default=packaged.ASSETS, help="where its folder goes"
    )
    parser.add_argument("--snapshots", type=Path, help="where copies go during training")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--measure", action="store_true", help="do not train, only measure")
    parser.add_argument("--threads", type=int, default=1, help="two can be slower on shared cores")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.specialist]
    output = args.output / recipe.name
    if not args.measure:
        train(recipe, output, snapshots=args.snapshots, resume=args.resume)
    measure_all(recipe, output)


if __name__ == "__main__":
    main()
