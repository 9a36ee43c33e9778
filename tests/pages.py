"""What pages of the documentation take for granted: models, texts and files, all tiny; and which numbers are smaller.

A page's code runs as it stands but for the swaps listed here, and for the models that it names (`tests/stand_ins.py`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ensembles import talking
from tests.tiny import saved
from tests.tiny_tokenizers import PROSE

TEXTS = [line for line in PROSE.splitlines() if line]
PAIRS = [{"prompt": f"the name {n} is", "completion": f" {word}"} for n, word in enumerate("abcd")]


def training(folder: Path) -> dict[str, Any]:
    """An anchor, specialists by path, general text, and the files of the working folder."""
    names = ("anchor", "specialist", "law", "towns", "words")
    models = {
        name: str(_roomy(saved(folder / name, "llama", "prose", seed=n)))
        for n, name in enumerate(names)
    }
    Path("notes").mkdir()
    Path("notes/notes.txt").write_text("\n\n".join(TEXTS * 4))
    for name in ("questions", "law", "chains"):
        found = [{**one, "prompt": f"{name}: {one['prompt']}"} for one in PAIRS * 3]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    return {
        **models,
        "gemma": str(_roomy(saved(folder / "gemma", "gemma3_text", "code"))),
        "texts": TEXTS,
        "general_text": TEXTS,
        "questions": "questions.jsonl",
        "prompts": [text[:20] for text in TEXTS[:2]],
        "validation_loss": lambda: 0.0,
    }


def _roomy(path: Path) -> Path:
    """A saved model that takes a block of general text."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 2048}))
    return path


def talkative(folder: Path) -> dict[str, Any]:
    """An ensemble that chats."""
    return {"model": talking("medical")}


def graph(folder: Path) -> dict[str, Any]:
    """Questions."""
    from rc_agents.graph import Question

    choices = ("one", "two", "three", "four")
    return {"questions": [Question(f"What is {n}?", choices, n % 4) for n in range(12)]}


def nodes(folder: Path) -> dict[str, Any]:
    """A saved ensemble."""
    talking("medical").save_pretrained(folder / "ensemble", include_bases=True)
    return {"ensemble": str(folder / "ensemble")}


GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "alignment": talkative,
    "graph": graph,
    "nodes": nodes,
    "performance": talkative,
    "training": training,
}
SWAPS = {
    "alignment": {"max_new_tokens=64": "max_new_tokens=4"},
    "training": {
        "steps=400, validation_share=0.1, patience=3, save_steps=50": (
            "steps=2, validation_share=0.3, patience=3, save_steps=1"
        ),
        "sites=[30]": "sites=[4]",  # the last of a tiny model's blocks
        '": 30': '": 4',
        'only="law"': 'TrainConfig(steps=1), only="law"',
    },
}
