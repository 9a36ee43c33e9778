"""One cell of a benchmark: a method in a setting and a seed, its scores in one JSON file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks.files import read, write
from rc_agents.benchmarks.methods import METHODS, Bench, NotApplicable
from rc_agents.benchmarks.methods.bench import FORMAT as FITTED
from rc_agents.benchmarks.settings import Setting, chosen
from rc_agents.benchmarks.tasks.transfer import evaluate

from rc_agents.provenance import provenance

FORMAT = 3  # of a cell's file: raise it when what is measured changes
UNTRAINED = (
    "frozen_anchor",
    "specialist",
    "second_specialist",
    "adapter_on_anchor",
    "merged_adapters",
    "text_handoff",
)
ALONE, OTHERS = ("frozen_anchor",), ("specialists", "worlds")
TRAINING = ("recipe", "rates", "topology")  # of a setting: what these do not read
SAME = {
    "adapter_on_anchor": "specialist"
}  # where the specialist is an adapter on the anchor's base

STARTED = provenance(0)
"""Where this process's figures come from: taken before it computes any, as commits may follow while it runs."""


def is_current(path: Path, key: str) -> bool:
    """Whether a cell's file is there and made with this key."""
    try:
        return bool(read(path).get("key") == key)
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class Cell:
    """A method in a setting and a seed."""

    setting: Setting
    method: str
    seed: int

    def path(self, output: Path) -> Path:
        """Returns where its JSON lies."""
        return output / self.setting.name / f"{self.method}-{self.seed}.json"

    def key(self, bench: Bench) -> str:
        """Returns the hash of its config, its questions and the specialists' adapters: a file of the key is up to date.

        A method without training depends on neither the recipe nor the setting's name, so settings share its cell.
        """
        setting = chosen(self.setting)
        alone = self.method in ALONE
        left_out = (*(TRAINING if self.method in UNTRAINED else ()), *(OTHERS if alone else ()))
        for name in ("name", *left_out):
            setting.pop(name, None)
        about = {
            "format": [FORMAT, *(() if self.method in UNTRAINED else (FITTED,))],
            "setting": setting,
            "specialists": [] if alone else list(self.setting.specialists),
            "method": SAME.get(self.method, self.method) if bench.shares_base else self.method,
            "seed": self.seed,
            "asked": bench.asked,
            "adapters": {} if alone else bench.adapters,
            "device": torch.device(bench.device or "cpu").type,
        }
        if self.method not in UNTRAINED:
            about |= bench.phrasings
        text = json.dumps(about, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_done(self, output: Path, key: str) -> bool:
        """Whether its file is there and made with this key."""
        return is_current(self.path(output), key)

    def run(self, bench: Bench, output: Path) -> dict[str, Any]:
        """Fits and scores the method, or takes over another cell of the same key; writes the file and returns it."""
        begun = time.perf_counter()
        record: dict[str, Any] = {
            "key": self.key(bench),
            "setting": self.setting.name,
            "method": self.method,
            "seed": self.seed,
            "config": json.loads(json.dumps(asdict(self.setting), default=str)),
            "adapters": bench.adapters,
            "asked": bench.asked,
        }
        if like := self._like(output, record["key"]):
            record = {**like, **record, "counts": counts(bench)}
            record["taken_from"] = [like["setting"], like["method"]]
            write(self.path(output), record)
            return record
        try:
            record |= self._scores(bench)
        except NotApplicable as reason:
            record["not_applicable"] = str(reason)
        record["seconds"] = round(time.perf_counter() - begun, 1)
        record["provenance"] = {**STARTED, "seed": self.seed}
        write(self.path(output), record)
        return record

    def _like(self, output: Path, key: str) -> dict[str, Any] | None:
        """Returns the record of another cell of this key, such as a frozen model's in another setting."""
        if self.method not in UNTRAINED:
            return None
        for path in sorted(output.glob(f"*/*-{self.seed}.json")):
            with contextlib.suppress(OSError, ValueError):
                record = read(path)
                if record.get("key") == key and "scores" in record:
                    return record
        return None

    def _scores(self, bench: Bench) -> dict[str, Any]:
        fitted = METHODS[self.method](bench)
        before = fitted.scorer.cost.to_dict()
        scores = evaluate(
            fitted.scorer, bench.exams, self.setting.sizes, bench.reference, bench.tokenizer
        )
        after = fitted.scorer.cost.to_dict()
        cost = {
            name: round(after[name] - before[name], 2)
            for name in before
            if name != "trained_parameters"
        }
        return {
            "scores": scores,
            "parameters": fitted.parameters,
            "steps": fitted.steps,
            "search": list(fitted.search),
            "training_seconds": round(fitted.seconds, 1),
            "notes": json.loads(json.dumps(dict(fitted.notes), default=str)),
            "cost": cost,
            "counts": counts(bench),
            "anchor": bench.reference.fingerprint,
        }


def counts(bench: Bench) -> dict[str, Any]:
    """Returns how many there are of everything that trains or scores."""
    sizes = bench.setting.sizes
    each = {}
    for world, one in zip(bench.worlds, bench.exams, strict=True):
        splits = world.split(bench.seed)
        each[world.name] = {
            "bridge_facts": len(splits.bridge),
            "trained_templates": len(world.trained),
            "validation": len(one.validation),
            "strangers": len(one.strangers),
            **{name: len(items) for name, items in one.sets.items()},
        }
    return {
        "worlds": each,
        "documents": sizes.documents,
        "document_tokens": sizes.document_tokens,
        "questions": sizes.questions,
        "retained_documents": bench.recipe.retained_documents,
        "retained_questions": bench.recipe.retained_questions,
    }
