"""The specialists of the knowledge-transfer task: which base is taught which world, once, into the user's cache.

`python -m rc_agents.benchmarks.specialists NAME` teaches one; asking for a path teaches what is missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from rc_agents.benchmarks.facts import WORLDS, World

from rc_agents import packaged
from rc_agents.training.data import Pair
from rc_agents.training.specialize import SpecializeConfig, specialize

SMOLLM2, GEMMA = "package:smollm2-135m", "package:gemma3-270m"


def _taught(
    steps: int, first: int, last: int | None, *, rank: int = 64, rate: float = 1e-3
) -> SpecializeConfig:
    """Settings for an adapter on the blocks from `first` to `last`, 1-based."""
    return SpecializeConfig(
        frozen_blocks=first - 1,
        last_block=last,
        rank=rank,
        alpha=2 * rank,
        learning_rate=rate,
        steps=steps,
        batch_size=16,
        dtype="float32",
        save_steps=100,
    )


@dataclass(frozen=True)
class Teaching:
    """One specialist: its base, its world and how it is taught."""

    base: str
    world: str
    config: SpecializeConfig


# SmolLM2 has 30 blocks. Its middle third is where facts about a name are looked up; of the two hops from a person to
# a town and from a town to a word, the first is taught to lower blocks than the second.
TEACHINGS = {
    "code_words": Teaching(SMOLLM2, "code_words", _taught(1200, 11, 20)),
    "home_towns": Teaching(SMOLLM2, "home_towns", _taught(1200, 6, 15)),
    "town_words": Teaching(SMOLLM2, "town_words", _taught(500, 16, 25)),
    "gemma_code_words": Teaching(GEMMA, "code_words", _taught(1200, 1, None, rank=16, rate=5e-4)),
}


def lessons(world: World) -> list[Pair]:
    """Every fact in every way that it is taught; a batch is of one way."""
    return [
        Pair(template.prompt(fact.subject), f" {fact.answer}", template.name)
        for template in world.taught
        for fact in world.facts
    ]


def path(name: str) -> Path:
    """Where a specialist's adapter lies; taught now where it is missing."""
    folder = packaged.cache_dir() / "transfer" / name
    if not (folder / "adapter_config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(
            folder.with_name(f"{name}.lock")
        ):  # another process waits for the one that teaches
            if not (folder / "adapter_config.json").exists():
                teach(name, folder)
    return folder


def teach(name: str, folder: Path) -> None:
    """Teaches a specialist and writes how beside it; goes on where an earlier try was interrupted."""
    teaching = TEACHINGS[name]
    kept = [*folder.with_name(f"{folder.name}.unfinished").glob("checkpoint-*")]
    whole = [one for one in kept if (one / "trainer_state.json").is_file()]  # written last
    for one in set(kept) - set(whole):
        shutil.rmtree(one)
    pairs = lessons(WORLDS[teaching.world]())
    taught = specialize(teaching.base, pairs, folder, teaching.config, resume=bool(whole))
    about = {"teaching": asdict(teaching), "seconds": taught.seconds, "loss": taught.loss}
    (folder / "teaching.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Teaches the specialists named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="+", choices=TEACHINGS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names:
        print(path(name))


if __name__ == "__main__":
    main()
