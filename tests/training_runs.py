"""A small training run for tests: in this process, or in one of its own that can be killed."""

import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import rc_agents
from rc_agents.training.bridges import TrainConfig, TrainResult, train
from rc_agents.training.checkpoints import steps
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

TEXTS = PROSE.splitlines()
PAIRS = [{"prompt": f"What is {n}?", "completion": f" the number {n}"} for n in range(12)]
QUICK: dict[str, Any] = {
    "batch_size": 3,
    "text_batch_size": 2,
    "block_length": 16,
    "retain_batch_size": 2,
    "learning_rate": 1e-2,
}
RUN: dict[str, Any] = {
    **QUICK,
    "steps": 12,
    "save_steps": 1,
    "log_steps": 5,
    "eval_steps": 3,
    "validation_share": 0.3,
    "retain_positions": 8,
}


def models(count: int = 2) -> list[Any]:
    """Tiny models of two blocks and one tokenizer."""
    size = len(tiny_tokenizer("prose"))
    return [tiny("llama", vocab_size=size, seed=n, layers=2, width=16) for n in range(count)]


def small(count: int = 2, **settings: Any) -> rc_agents.CoupledForCausalLM:
    """Couples loaded models: the anchor, b, c, ..."""
    anchor, *rest = models(count)
    specialists = dict(zip("bcd", rest, strict=False))
    tokenizers = dict.fromkeys(("anchor", *specialists), tiny_tokenizer("prose"))
    defaults = {"topology": "unilateral", "sites": 2, "bridge": {"gate": "token"}}
    return rc_agents.couple(anchor, specialists, tokenizers=tokenizers, **{**defaults, **settings})


def bases(folder: Path, count: int = 2) -> Path:
    """Saves the models of `small`, from where `opened` couples them."""
    for name, model in zip("abcd", models(count), strict=False):
        model.save_pretrained(folder / name)
        tiny_tokenizer("prose").save_pretrained(folder / name)
    return folder


def opened(folder: Path, **settings: Any) -> rc_agents.CoupledForCausalLM:
    """Couples the models of a folder."""
    anchor, *rest = sorted(path for path in folder.iterdir() if len(path.name) == 1)
    defaults = {"topology": "unilateral", "sites": 2, "bridge": {"gate": "token"}}
    return rc_agents.couple(
        str(anchor), {path.name: str(path) for path in rest}, **{**defaults, **settings}
    )


def run(folder: Path, output: Path, *, resume: bool = False, **changes: Any) -> TrainResult:
    """Trains the ensemble of a folder by `RUN`."""
    data, callbacks = changes.pop("data", [*PAIRS, *TEXTS]), changes.pop("callbacks", ())
    more = {name: changes.pop(name) for name in ("validation", "only") if name in changes}
    return train(
        opened(folder),
        data,
        output,
        TrainConfig(**{**RUN, **changes}),
        retain=TEXTS,
        resume=resume,
        callbacks=callbacks,
        progress=False,
        **more,
    )


def outcome(output: Path) -> dict[str, Any]:
    """Everything in which two equal runs are the same, by name."""
    config = json.loads((output / "config.json").read_text())
    return {
        "bridges": config["bridges_sha256"],
        "metrics": (output / "run" / "metrics.jsonl").read_text(),
    }


class _Ready(TrainerCallback):
    def __init__(self, event: Any) -> None:
        self.event = event

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says that training has begun."""
        self.event.set()


def _child(folder: Path, output: Path, event: Any, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    resume = output.with_name(output.name + ".unfinished").joinpath("config.json").exists()
    run(folder, output, resume=resume, callbacks=[_Ready(event)], **changes)


def _wait_for_checkpoints(unfinished: Path, count: int, process: Any) -> None:
    """Waits until there are as many more checkpoints, or the process has ended."""
    start = max(steps(unfinished), default=0)
    while process.is_alive() and max(steps(unfinished), default=0) < start + count:
        time.sleep(0.001)


def killed_and_resumed(
    folder: Path,
    output: Path,
    kills: int,
    *,
    seed: int,
    **changes: Any,
) -> list[str]:
    """Trains in processes that are killed at random moments until it has happened `kills` times, then to the end.

    Args:
        folder: of `bases`.
        output: of the run.
        kills: how often.
        seed: of the moments: within a fifth of a second behind the next few checkpoints; one in five kills comes in
            the first half second of a process.
        changes: of `RUN`.

    Returns:
        For each kill what was there: the last checkpoint, and whether another one was being written.
    """
    # A fork of the test's own process would inherit autograd's threads.
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training_runs"])
    rng, seen = random.Random(seed), []
    unfinished = output.with_name(output.name + ".unfinished")
    while True:
        event = context.Event()
        process = context.Process(target=_child, args=(folder, output, event, changes))
        process.start()
        if len(seen) < kills:
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, 0.5))
            else:
                event.wait(120)
                _wait_for_checkpoints(unfinished, rng.randrange(4), process)
                time.sleep(rng.uniform(0, 0.2))
            process.kill()
        process.join(120)
        if process.exitcode == 0:
            return seen
        assert process.exitcode == -9, f"the run failed by itself: exit code {process.exitcode}"
        places = sorted(path.name for path in unfinished.glob("*")) if unfinished.exists() else []
        seen.append(", ".join(name for name in places if "checkpoint" in name or "saving" in name))
