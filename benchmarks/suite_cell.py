"""One cell of a suite: a method in a setting and a seed, scored by the setting's tasks, in one JSON file."""

from __future__ import annotations

import functools
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
from rc_agents.benchmarks.cells import ALONE, STARTED, TRAINING
from rc_agents.benchmarks.cells import UNTRAINED as ANSWERS_AS_IT_IS
from rc_agents.benchmarks.code import fingerprint as code_of
from rc_agents.benchmarks.domains import fingerprint as hash_of
from rc_agents.benchmarks.intervals import total
from rc_agents.benchmarks.memory import peak
from rc_agents.benchmarks.methods import Bench, Fitted, NotApplicable, method
from rc_agents.benchmarks.methods.bench import SCORED_QUESTIONS
from rc_agents.benchmarks.scores import KINDS, Score
from rc_agents.benchmarks.settings import Setting, chosen
from rc_agents.benchmarks.suite import Part
from rc_agents.benchmarks.tasks.items import documents, questions
from rc_agents.benchmarks.tiny_models import place

from rc_agents import packaged

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
            "specialists": [] if self.method in ALONE else list(self.part.setting.specialists),
            "adapters": {} if self.method in ALONE else bench.adapters,
            "bases": bases(self.part.setting, alone=self.method in ALONE),
            "ensemble": saved(self.part.setting.ensemble),
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
    """Returns the hash of all that a part's tasks ask and that may train.

    What trains in place of a saved ensemble's lessons goes by that ensemble's own hash.
    """
    texts = [text for one in part.tasks.values() for text in one.texts(bench)]
    recipe = part.setting.recipe
    kept = documents("train", recipe.retained_documents)
    kept += questions(recipe.retained_questions, skip=SCORED_QUESTIONS)
    return hash_of([*texts, bench.asked, *kept])


def bases(setting: Setting, *, alone: bool) -> dict[str, str]:
    """Returns the hash of the weights of every base in a folder; packaged ones and ids stand for themselves."""
    sources = [] if alone else [source.base for source in setting.specialists.values()]
    names = {name for name in (setting.anchor, *sources) if not packaged.is_packaged(name)}
    return {name: _weights(place(name)) for name in sorted(names)}


def saved(ensemble: str | None) -> str | None:
    """Returns the hash of a saved ensemble's bridges; an id of the hub stands for itself."""
    if ensemble is None:
        return None
    folder = packaged.resolve(ensemble) if packaged.is_packaged(ensemble) else Path(ensemble)
    return _weights(str(folder))


@functools.cache
def _weights(folder: str) -> str:
    files_there = sorted(Path(folder).glob("*.safetensors"))
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files_there]
    return hash_of(hashes) if hashes else folder


def fail(cell: Cell, output: Path, error: Exception) -> None:
    """Writes that a cell failed, in the place of an older result; it is run again the next time."""
    about = {"suite": cell.suite, "setting": cell.part.setting.name, "method": cell.method}
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    files.write(cell.path(output), about | {"key": "", "seed": cell.seed, "failed": why})


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
    made = {**STARTED, "seed": cell.seed}
    made["hardware"] = {**STARTED["hardware"], "threads": torch.get_num_threads()}
    record["provenance"] = made
    files.write(cell.path(output), record)
    return record


def _measured(cell: Cell, bench: Bench) -> dict[str, Any]:
    bench.method, bench.code = cell.method, cell.code()
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
