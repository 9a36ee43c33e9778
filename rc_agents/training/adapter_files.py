"""The folder of a trained adapter: float16 safetensors, config, log and card."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rc_agents.errors import TrainingError

LOG = "training.jsonl"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def weights_hash(adapter: str | Path) -> str:
    """Returns a hash of an adapter's weights."""
    return hashlib.sha256((Path(adapter) / _WEIGHTS).read_bytes()).hexdigest()[:16]


def save_adapter(
    model: PeftModel,
    output: str | Path,
    *,
    base: str,
    first_block: int = 0,
    last_block: int | None = None,
    log: Sequence[Mapping[str, Any]] = (),
    card: str = "",
) -> None:
    """Writes an adapter folder; an old one is replaced whole.

    Args:
        model: the trained PEFT model.
        output: folder to make.
        base: name of the base to write into the adapter's config.
        first_block: which block of the whole base the model's first block is.
        last_block: the last block of the whole base that has an adapter, 1-based; None for its last.
        log: training figures, one JSON line each.
        card: text of its README.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        made = Path(scratch) / "made"
        model.save_pretrained(str(made), save_embedding_layers=False)
        pattern = _mend_weights(made / _WEIGHTS, first_block)
        settings: dict[str, Any] = {"base_model_name_or_path": base, "inference_mode": True}
        if first_block or last_block is not None:
            last = last_block or first_block + model.config.num_hidden_layers
            settings |= {
                "layers_to_transform": [*range(first_block, last)],
                "layers_pattern": pattern,
            }
        _mend_config(made / _CONFIG, settings)
        lines = "".join(json.dumps(entry) + "\n" for entry in log)
        (made / LOG).write_text(lines, encoding="utf-8")
        (made / "README.md").write_text(
            card or f"A PEFT adapter over `{base}`.\n", encoding="utf-8"
        )
        if output.exists():
            os.replace(output, Path(scratch) / "old")
        os.replace(made, output)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Returns the config of a LoRA adapter's folder.

    Raises:
        TrainingError: there is none, or of another kind.
    """
    path = Path(folder) / _CONFIG
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder} has no adapter to go on from: {error}") from error
    if found.get("peft_type") != "LORA":
        raise TrainingError(
            f"{folder} holds an adapter of the kind {found.get('peft_type')}; only LORA can be trained further"
        )
    return found


def load_adapter(model: PeftModel, folder: str | Path, first_block: int = 0) -> None:
    """Copies an adapter's weights into a PEFT model of the same form.

    Args:
        model: whose adapter is overwritten.
        folder: of the adapter.
        first_block: which block of the whole base the model's first block is.

    Raises:
        TrainingError: its weights are missing, or are not those of this model.
    """
    path = Path(folder) / _WEIGHTS
    if not path.is_file():
        raise TrainingError(f"{folder} has no {_WEIGHTS} to go on from")
    weights = {_renumbered(name, -first_block): part for name, part in load_file(path).items()}
    try:
        done = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise TrainingError(f"{folder} does not fit the base: {error}") from error
    missing = [name for name in done.missing_keys if "lora_" in name]
    if missing or done.unexpected_keys:
        raise TrainingError(
            f"{folder} does not fit the base: {len(missing)} weights are missing and "
            f"{len(done.unexpected_keys)} unknown, such as {[*missing, *done.unexpected_keys][0]}"
        )


def _renumbered(name: str, by: int) -> str:
    """Returns a weight's name with its block counted so many further."""
    return re.sub(
        r"\.(\w+)\.(\d+)\.", lambda found: f".{found[1]}.{int(found[2]) + by}.", name, count=1
    )


def _mend_weights(path: Path, first_block: int) -> str:
    """Counts the blocks in the weights' names from `first_block`; returns what the block list is called."""
    pattern, weights = "layers", {}
    for name, tensor in load_file(path).items():
        if found := re.search(r"\.(\w+)\.\d+\.", name):
            pattern = found[1]
        weights[_renumbered(name, first_block)] = tensor.half().contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    return pattern


def _mend_config(path: Path, settings: Mapping[str, Any]) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    targets = found["target_modules"]
    if not isinstance(targets, str):
        if settings.get(
            "layers_to_transform"
        ):  # whole paths would name blocks by their place in the cut model
            targets = {target.rsplit(".", 1)[-1] for target in targets}
        found["target_modules"] = sorted(targets)  # a set, in any order
    text = json.dumps({**found, **settings}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
