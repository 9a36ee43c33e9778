"""What of a running training goes into a checkpoint, as bytes without pickle, and back."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from rc_agents.checkpoint.identity import put, state_of
from rc_agents.modeling import CoupledForCausalLM

BRIDGES, BEST, OPTIMIZER = "bridges.safetensors", "best.safetensors", "optimizer.safetensors"
PROGRESS = "progress.json"


def as_bytes(data: Any) -> bytes:
    """Returns JSON."""
    return (json.dumps(data, indent=1) + "\n").encode()


def read_json(path: Path) -> Any:
    """Reads what `as_bytes` made."""
    return json.loads(path.read_text(encoding="utf-8"))


def bridges(model: CoupledForCausalLM) -> bytes:
    """Returns all that is the ensemble's own, trained or not."""
    return save(state_of(model))


def put_bridges(model: CoupledForCausalLM, file: Path) -> None:
    """Fills the ensemble with the bridges of a file; all or nothing."""
    put(model, load(file.read_bytes()), str(file))


def tensors(state: Mapping[str, Tensor]) -> bytes:
    """Returns tensors by name."""
    return save({name: one.detach().cpu().contiguous() for name, one in state.items()})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads what `tensors` made."""
    return load(file.read_bytes())


def optimizer(state: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Returns an optimizer's state: its tensors, and the rest for JSON."""
    flat = {
        f"{index}.{key}": value
        for index, values in state["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    rest = {
        str(index): {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for index, values in state["state"].items()
    }
    return tensors(flat), {"groups": state["param_groups"], "rest": rest}


def read_optimizer(file: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `optimizer` was given."""
    state: dict[int, dict[str, Any]] = {
        int(index): dict(rest) for index, rest in described["rest"].items()
    }
    for name, tensor in read_tensors(file).items():
        index, key = name.split(".", 1)
        state[int(index)][key] = tensor
    return {"state": state, "param_groups": described["groups"]}


def generators() -> dict[str, Any]:
    """Returns the state of every random generator of this process, for JSON."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _hex(torch.random.get_rng_state()),
        "cuda": [_hex(state) for state in cuda],
    }


def set_generators(found: Mapping[str, Any]) -> None:
    """Sets every random generator of this process as `generators` found it."""
    version, words, gauss = found["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = found["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(_unhex(found["torch"]))
    if torch.cuda.is_available() and len(found["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_unhex(state) for state in found["cuda"]])


def _hex(state: Tensor) -> str:
    return bytes(state.cpu().tolist()).hex()


def _unhex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
