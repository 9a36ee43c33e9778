"""Loads frozen models, their adapters and their tokenizers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from .. import packaged
from ..config import ModelRef
from ..errors import ModelError, RCError
from ..quantization import loader_config
from .encoders import encoder_config


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Puts the model in eval mode and takes every parameter out of training; returns it."""
    return model.eval().requires_grad_(False)


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of the model's structure over the same weight tensors; hooks are not copied."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    taken = {module: module._forward_hooks for module in model.modules()}
    for module in taken:
        module._forward_hooks = type(module._forward_hooks)()
    try:
        return copy.deepcopy(model, memo)
    finally:
        for module, hooks in taken.items():
            module._forward_hooks = hooks


def locate(reference: str) -> str:
    """Returns the hub id or directory behind a base's name; converts a packaged model on first use."""
    if packaged.is_packaged(reference):
        return str(packaged.resolve(reference))
    return str(Path(reference).expanduser()) if reference.startswith("~") else reference


def _check_folder(name: str, reference: str) -> None:
    """Raises `ModelError` for what can only be a path, and is not there."""
    is_path = reference.startswith((".", "~", "/")) or reference.count("/") > 1 or "\\" in reference
    if is_path and not Path(reference).expanduser().is_dir():
        raise ModelError(
            f"model {name!r}: there is no folder {reference!r}; "
            "expected a model's folder, a hub id (owner/name) or package:NAME"
        )


def load(
    name: str,
    ref: ModelRef,
    *,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    base: PreTrainedModel | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a frozen model, with its adapter when the reference has one.

    Args:
        name: the model's name in the ensemble, for messages.
        ref: where it comes from.
        dtype: dtype of the weights unless the reference has its own; None keeps the stored one.
        device_map: whatever Hugging Face's `from_pretrained` accepts.
        base: an already loaded copy of the same base, whose weights an adapter specialist then shares.
        trust_remote_code: passed on; off unless the user asks for it.
        kwargs: more settings of Hugging Face's `from_pretrained`; None leaves one out.

    Raises:
        ModelError: the base or adapter is missing or cannot be loaded; the message names the model.
    """
    if ref.base is None:
        raise ModelError(
            f"model {name!r} was passed in loaded and has no path or id to load it from"
        )
    if base is None:
        _check_folder(name, ref.base)
        options = {
            "revision": ref.revision,
            "subfolder": ref.subfolder,
            "device_map": device_map,
            "quantization_config": loader_config(name, ref.quantization),
            **kwargs,
        }
        options = {key: value for key, value in options.items() if value is not None}
        options |= {
            "dtype": ref.dtype or dtype or "auto",
            "trust_remote_code": trust_remote_code,
            "use_safetensors": True,
        }
        try:
            base = _from_pretrained(name, locate(ref.base), options)
        except RCError:
            raise
        except Exception as error:
            raise ModelError(
                f"model {name!r} cannot be loaded from {ref.base!r}: {first_line(error)}"
            ) from error
    elif ref.adapter is not None:
        base = share_weights(base)
    return freeze(base if ref.adapter is None else _with_adapter(name, base, ref))


def _from_pretrained(name: str, place: str, options: dict[str, Any]) -> PreTrainedModel:
    where = {key: options[key] for key in ("revision", "subfolder") if key in options}
    config = encoder_config(place, **where)
    if config is None:
        return AutoModelForCausalLM.from_pretrained(place, **options)
    model, found = AutoModel.from_pretrained(
        place, config=config, output_loading_info=True, **options
    )
    missing = sorted(found["missing_keys"])
    if missing and all(one.startswith("pooler.") for one in missing):
        model.pooler, missing = None, []  # a head that the checkpoint lacks, and no state needs
    if missing:
        raise ModelError(
            f"model {name!r}: {place!r} lacks weights of its encoder, such as {missing[0]!r}"
        )
    return model


def skeleton(config: PreTrainedConfig, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """Returns a model of shapes alone (on the meta device), for one whose weights another process holds."""
    with torch.device("meta"):
        return freeze(AutoModelForCausalLM.from_config(config, dtype=dtype or "auto"))


def _with_adapter(name: str, base: PreTrainedModel, ref: ModelRef) -> PreTrainedModel:
    try:
        import peft
    except ImportError:
        raise ModelError(
            f"model {name!r} has the adapter {ref.adapter!r}, which needs PEFT; run: pip install 'rc-agents[train]'"
        ) from None
    if any(one.is_meta for one in base.parameters()):
        raise ModelError(
            f"model {name!r}: an adapter does not go onto a base that lies partly in memory or on disk beside its "
            "device; give the base a device that holds it, or merge the adapter and load the result"
        )
    try:
        place = locate(str(ref.adapter))
        config = peft.PeftConfig.from_pretrained(place, revision=ref.adapter_revision)
        weights = peft.utils.load_peft_weights(place, device="cpu", revision=ref.adapter_revision)
        peft.inject_adapter_in_model(config, base)
        result: Any = peft.set_peft_model_state_dict(base, weights)
        if result.unexpected_keys:
            raise ValueError(
                f"it has weights that the base has no place for, such as {result.unexpected_keys[0]!r}"
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"model {name!r}: adapter {ref.adapter!r} does not load onto {ref.base!r}: {first_line(error)}"
        ) from error
    return base


def load_tokenizer(ref: ModelRef, *, trust_remote_code: bool = False) -> Any | None:
    """Returns the base's tokenizer, or None where it has none.

    For a folder without tokenizer files transformers makes one that reads nothing; that counts as none.
    """
    if ref.base is None:
        return None
    options = {"revision": ref.revision, "subfolder": ref.subfolder}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            locate(ref.base), trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
