"""One cell of a suite: a method in a setting and a seed, scored by the setting's tasks, in one JSON file."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks import files
from rc_agents.benchmarks.cells import ALONE, TRAINING
from rc_agents.benchmarks.cells import UNTRAINED as ANSWERS_AS_IT_IS
from rc_agents.benchmarks.code import fingerprint as code_of
from rc_agents.benchmarks.domains import fingerprint as hash_of
from rc_agents.benchmarks.memory import peak
from rc_agents.benchmarks.methods import Bench, Fitted, NotApplicable, method
from rc_agents.benchmarks.scores import KINDS, Score, total
from rc_agents.benchmarks.settings import chosen
from rc_agents.benchmarks.suite import Part

from rc_agents.provenance import provenance

FORMAT = 1  # of a cell's file: raise it when what a cell holds changes
UNTRAINED = (
    *ANSWERS_AS_IT_IS,
    "third_specialist",
    "mean_logit_ensemble",
    "agent_anchor",
    "agent_specialist",
    "agent_handoff",
    "agent_three",
    "agent_routed",
    "agent_critique",
)
STARTED = provenance(0)
"""Taken before this process computes anything, as commits may follow while it runs."""


@dataclass(frozen=True)
class Cell:
    """One method in one setting of a suite with one seed."""

    suite: str
    part: Part
    method: str
    seed: int

    @property
    def name(self) -> str:
        """What a line about it begins with."""
        return f"{self.part.setting.name} {self.method} seed {self.seed}"

    def path(self, output: Path) -> Path:
        """Returns where its JSON lies."""
        return output / self.part.setting.name / f"{self.method}-{self.seed}.json"

    def key(self, bench: Bench) -> str:
        """Returns the hash of its config, data, adapters and code; a file of the same key is up to date.

        What a method does not depend on is left out, so a frozen model on fixed texts is the same cell in every seed.
        """
        setting = chosen(self.part.setting)
        untrained = self.method in UNTRAINED
        for name in ("name", *(TRAINING if untrained else ())):
            setting.pop(name, None)
        if self.method in ALONE:
            setting.pop("specialists", None)
        seeded = not untrained or "agents" in {name.split(":")[0] for name in self.part.tasks}
        about = {
            "format": FORMAT,
            "setting": setting,
            "method": self.method,
            "seed": self.seed if seeded or self.part.setting.worlds else None,
            "tasks": chosen(self.part.options),
            "asked": asked(self.part, bench),
            "adapters": {} if self.method in ALONE else bench.adapters,
            "code": self.code(),
            "device": torch.device(bench.device or "cpu").type,
        } | bench.phrasings
        text = json.dumps(about, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def code(self) -> str:
        """Returns the hash of the benchmark's own code that makes it: its method, its tasks and what they import."""
        made = method(self.method)
        modules = [inspect.unwrap(made).__module__]
        modules += [type(one).__module__ for one in self.part.tasks.values()]
        return code_of([*modules, "rc_agents.benchmarks.scores"])


def asked(part: Part, bench: Bench) -> str:
    """Returns the hash of all that a part's tasks ask and that may train."""
    texts = [text for one in part.tasks.values() for text in one.texts(bench)]
    return hash_of([*texts, bench.asked])


def is_done(path: Path, key: str) -> bool:
    """Whether a cell's file is there and made with this key."""
    try:
        return bool(files.read(path).get("key") == key)
    except (OSError, ValueError):
        return False


def run_cell(cell: Cell, bench: Bench, output: Path) -> dict[str, Any]:
    """Fits and scores a method, or takes over a cell of the same key; writes the file and returns its record."""
    setting = cell.part.setting
    record: dict[str, Any] = {
        "key": cell.key(bench),
        "suite": cell.suite,
        "setting": setting.name,
        "method": cell.method,
        "seed": cell.seed,
        "config": json.loads(json.dumps(asdict(setting), default=str)),
        "tasks": json.loads(json.dumps(cell.part.options)),
        "leaks": cell.part.leaks,
        "adapters": bench.adapters,
        "data": asked(cell.part, bench),
        "code": cell.code(),
    }
    if like := _like(output, cell, record["key"]):
        record = {**like, **record, "taken_from": like["seed"]}
        files.write(cell.path(output), record)
        return record
    wall, processor = time.perf_counter(), time.process_time()
    with peak() as memory:
        record |= _measured(cell, bench)
    record["seconds"] = round(time.perf_counter() - wall, 2)
    record["cpu_seconds"] = round(time.process_time() - processor, 2)
    record |= memory
    record["models"] = fingerprints(bench)
    record["provenance"] = {**STARTED, "seed": cell.seed}
    files.write(cell.path(output), record)
    return record


def _measured(cell: Cell, bench: Bench) -> dict[str, Any]:
    try:
        fitted = method(cell.method)(bench)
    except NotApplicable as reason:
        return {"not_applicable": str(reason)}
    scores: dict[str, Any] = {}
    absent: dict[str, str] = {}
    costs: dict[str, Any] = {}
    for name, one in cell.part.tasks.items():
        before = fitted.scorer.cost.to_dict()
        try:
            found = one.run(bench, fitted.scorer)
        except NotApplicable as reason:
            absent[name] = str(reason)
            continue
        scores |= {_named(name, measure): score.to_dict() for measure, score in found.items()}
        after = fitted.scorer.cost.to_dict()
        costs[name] = {key: round(after[key] - before[key], 3) for key in before}
        costs[name].pop("trained_parameters")
    return {
        "scores": scores,
        "absent": absent,
        "costs": costs,
        "counts": {name: len(one["values"]) for name, one in scores.items()},
        **_effort(fitted),
    }


def _named(task: str, measure: str) -> str:
    """A measure's name behind that of its group: the task's, where it does not say another."""
    return measure if "/" in measure else f"{task}/{measure}"


def _effort(fitted: Fitted) -> dict[str, Any]:
    return {
        "parameters": fitted.parameters,
        "steps": fitted.steps,
        "search": list(fitted.search),
        "training_seconds": round(fitted.seconds, 1),
        "notes": json.loads(json.dumps(dict(fitted.notes), default=str)),
    }


def _like(output: Path, cell: Cell, key: str) -> dict[str, Any] | None:
    """Returns the record of another seed's cell with this key."""
    for path in sorted(output.glob(f"{cell.part.setting.name}/{cell.method}-*.json")):
        try:
            record = files.read(path)
        except (OSError, ValueError):
            continue
        if record.get("key") == key and "scores" in record:
            return record
    return None


def fingerprints(bench: Bench) -> dict[str, str]:
    """Returns the hash of every frozen model's files."""
    return {
        name: str(bench.frozen.base_fingerprint(name))
        for name in ("anchor", *bench.frozen.specialists)
    }


def summary(record: Mapping[str, Any]) -> str:
    """Returns a cell's first scores in a line."""
    if "not_applicable" in record:
        return f"not applicable: {record['not_applicable']}"
    shown = []
    for name, one in list(record["scores"].items())[:4]:
        kind, found = KINDS[one["kind"]], total([Score.of(one)])
        shown.append(f"{name} {found.value:.{kind.digits}f} {kind.unit}".strip())
    taken = " (as in another seed)" if "taken_from" in record else f" ({record['seconds']:.0f} s)"
    return ", ".join(shown) + taken
