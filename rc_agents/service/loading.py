"""From a name to an ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .. import packaged
from ..config import CouplingConfig
from ..modeling import CoupledForCausalLM, couple


def load(reference: str | Path, **options: Any) -> CoupledForCausalLM:
    """Loads a saved ensemble, or a single model as an ensemble of one.

    Args:
        reference: folder or hub id or `package:NAME` of either.
        options: device_map, dtype, schedule, trust_remote_code, as in `rc_agents.couple`.

    Raises:
        RCError: one line that says what is missing or does not fit.
    """
    name = str(reference)
    if _is_ensemble(name):
        return CoupledForCausalLM.from_pretrained(name, **options)
    return couple(name, **options)


def _is_ensemble(name: str) -> bool:
    place = str(packaged.resolve(name)) if packaged.is_packaged(name) else name
    try:
        settings, _ = PreTrainedConfig.get_config_dict(place)
    except (OSError, ValueError):
        return False  # the loader that looks for the weights says what is wrong
    return settings.get("model_type") == CouplingConfig.model_type
