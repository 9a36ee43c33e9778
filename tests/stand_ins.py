"""Runs code written for real models on tiny ones: each model it names gets a random stand-in."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import saved

ROOM = 4096  # tokens, for an agent that tells of its tools at length
ADAPTER = re.compile(r'(?<=adapter=)"([^"]+)"')
MODEL = re.compile(r'"(package:[^"]+|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"')


def run_on_tiny_models(source: str, file: Path, folder: Path, names: dict[str, Any]) -> None:
    """Executes Python code with every model reference in it replaced.

    A reference is a string like "package:name" or "owner/name", or the value of `adapter=`. The
    same reference is the same tiny Llama throughout; all of them share one tokenizer.

    Args:
        source: the code.
        file: where it stands, for tracebacks.
        folder: where stand-ins are written.
        names: the namespace it runs in, and changes.
    """
    source = ADAPTER.sub(lambda found: repr(str(_adapter(folder, found[1]))), source)
    source = MODEL.sub(lambda found: repr(str(_model(folder, found[1]))), source)
    exec(compile(source, file, "exec"), names)


def _model(folder: Path, reference: str) -> Path:
    """The tiny Llama behind a reference, with weights of its own."""
    number = zlib.crc32(reference.encode())
    path = folder / f"model-{number}"
    if path.exists():
        return path / "llama-prose"
    made = saved(path, "llama", "prose", seed=number % 1000)
    settings = json.loads((made / "config.json").read_text())
    settings["max_position_embeddings"] = ROOM
    (made / "config.json").write_text(json.dumps(settings))
    return made


def _adapter(folder: Path, reference: str) -> Path:
    """A LoRA adapter that fits every tiny Llama."""
    path = folder / f"adapter-{zlib.crc32(reference.encode())}"
    if not path.exists():
        base = AutoModelForCausalLM.from_pretrained(_model(folder, "any/base"))
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(base, lora).save_pretrained(path)
    return path
