"""What a run leaves beside the trained ensemble: how it was made, its metrics, its plots.

While it runs all of it is in `OUTPUT.unfinished`, checkpoints included; at the end in `OUTPUT/run`, without them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import rc_agents
from rc_agents.errors import TrainingError
from rc_agents.provenance import git_hash
from rc_agents.training import checkpoints, plots, snapshot

CONFIG, METRICS, RUN = "config.json", "metrics.jsonl", "run"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")


def unfinished(output: Path) -> Path:
    """Returns where the run that will make `output` keeps its files."""
    return output.with_name(output.name + ".unfinished")


def has_checkpoint(output: str | Path) -> bool:
    """Whether a run that would make `output` was cut short and left a checkpoint."""
    return bool(checkpoints.steps(unfinished(Path(output))))


def begin(folder: Path, described: Mapping[str, Any]) -> None:
    """Starts a run's folder; one of a run that was cut short is removed, with a warning where it had checkpoints."""
    if checkpoints.steps(folder):
        warnings.warn(
            f"{folder} holds the checkpoints of an unfinished run, which this one replaces; resume goes on with them",
            stacklevel=4,
        )
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    start = {"commands": [command()], "started": _now(), "git": git_hash(), "versions": versions()}
    _replace(folder / CONFIG, snapshot.as_bytes({**described, **start}))


def check_there(folder: Path) -> None:
    """Raises `TrainingError` where there is no unfinished run."""
    if not (folder / CONFIG).is_file():
        raise TrainingError(
            f"nothing to resume: there is no unfinished run in {folder}; leave out resume, and set save_steps"
        )


def go_on(folder: Path, identity: Mapping[str, Any], process: int) -> Path | None:
    """Returns the checkpoint to go on from, None where the run was cut short before its first.

    Args:
        folder: of the unfinished run.
        identity: what this run must have in common with that one.
        process: the number of this process; the first notes the command.

    Raises:
        TrainingError: another config or other data, or checkpoints of which none is whole.
    """
    checkpoints.clear(folder)
    place = checkpoints.last(folder)
    described = snapshot.read_json(folder / CONFIG)
    before = described["identity"]
    if place is not None:
        before = snapshot.read_json(place / snapshot.PROGRESS)["identity"]
    if found := difference(before, json.loads(json.dumps(identity))):
        raise TrainingError(f"cannot resume {folder}: {found}; start anew without resume")
    if not process:
        described["commands"].append(command())
        _replace(folder / CONFIG, snapshot.as_bytes(described))
    return place


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Names the first thing in which two runs differ."""
    for part in sorted(before.keys() | now.keys()):
        old, new = before.get(part), now.get(part)
        if old == new:
            continue
        if part == "data":
            sets = [
                name for name in ("data", "retain", "validation") if old.get(name) != new.get(name)
            ]
            return f"the {sets[0]} set holds other examples than before"
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k))
            return f"{key} was {_short(old.get(key))}, now it is {_short(new.get(key))}"
        return f"{part} was {_short(old)}, now it is {_short(new)}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def finish(folder: Path, output: Path) -> None:
    """Draws the plots and moves the run's files into the output's folder, without checkpoints."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    plots.draw([json.loads(line) for line in lines], folder)
    place = output / RUN
    if place.is_dir():
        shutil.rmtree(place)
    folder.replace(place)
    for step in checkpoints.steps(place):
        shutil.rmtree(place / f"checkpoint-{step}")


class Metrics(TrainerCallback):
    """Writes metrics as they come, one JSON object a line; a resumed run drops those behind its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes what was logged before the checkpoint, which is nothing in a new run."""
        if state.is_world_process_zero:
            lines = [json.dumps(entry) + "\n" for entry in state.log_history]
            _replace(self.path, "".join(lines).encode())

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds a line."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(state.log_history[-1]) + "\n")


def _replace(path: Path, content: bytes) -> None:
    staging = path.with_name(f".{path.name}")
    staging.write_bytes(content)
    staging.replace(path)


def command() -> str:
    """Returns the command line of this process, to be pasted into a shell."""
    return shlex.join(sys.orig_argv)


def versions() -> dict[str, str]:
    """Returns the versions of what a run depends on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "rc_agents": rc_agents.__version__, **found}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
