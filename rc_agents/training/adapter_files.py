"""The folder of a trained adapter: float16 safetensors, config, log and card."""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file

LOG = "training.jsonl"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


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


def _mend_weights(path: Path, first_block: int) -> str:
    """Counts the blocks in the weights' names from `first_block`; returns what the block list is called."""
    pattern, weights = "layers", {}
    for name, tensor in load_file(path).items():
        found = re.search(r"\.(\w+)\.(\d+)\.", name)
        if found is not None:
            pattern = found[1]
            block = f".{pattern}.{int(found[2]) + first_block}."
            name = name[: found.start()] + block + name[found.end() :]
        weights[name] = tensor.half().contiguous()
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
