"""A frozen causal language model: load it, freeze it, find its blocks, tap them."""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from . import packaged
from .config import ModelRef
from .errors import ModelError

Arrive = Callable[[int, Tensor], Tensor]

ARRIVE: ContextVar[Arrive | None] = ContextVar("rc_agents_arrive", default=None)
"""What the running model's taps call with (site index, hidden states); None outside a coupled pass."""

BLOCKS = {
    "longcat_flash": "model.layers",
    "xlm": "transformer.attentions",
    "hrm_text": "model.layers",
    "blenderbot": "model.decoder.layers",
}
"""Where the blocks are, for the types in which the count of layers does not tell."""


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the model's decoder blocks: its only ModuleList of `num_hidden_layers` entries.

    Raises:
        ModelError: none or several such lists; the message names the type and the candidates.
    """
    kind = model.config.model_type
    if kind in BLOCKS:
        return model.get_submodule(BLOCKS[kind])  # type: ignore[return-value]
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    found = [(path, module) for path, module in lists if len(module) == count]
    if len(found) == 1:
        return found[0][1]
    shown = ", ".join(f"{path}[{len(module)}]" for path, module in found or lists) or "none"
    raise ModelError(
        f"model type {kind!r} is not supported: expected exactly one list of {count} blocks, found {shown}"
    )


def num_blocks(model: PreTrainedModel) -> int:
    """Returns how many blocks the model has."""
    return len(find_blocks(model))


def stream_width(model: PreTrainedModel) -> int:
    """Returns the width of the residual stream between blocks."""
    config = model.config.get_text_config(decoder=True)
    return int(config.hidden_size)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Puts the model in eval mode and takes every parameter out of training; returns it."""
    return model.eval().requires_grad_(False)


def tap(
    model: PreTrainedModel, layers: Mapping[int, int]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Lets a session see and replace the hidden states behind chosen blocks.

    Outside a coupled pass the hooks do nothing and change no bit.

    Args:
        layers: 1-based block -> site index.

    Returns:
        Handles that take the hooks off.
    """
    blocks = find_blocks(model)
    return [blocks[layer - 1].register_forward_hook(_hook(site)) for layer, site in layers.items()]


def _hook(site: int) -> Callable[..., Any]:
    def after_block(module: nn.Module, args: Any, output: Any) -> Any:
        arrive = ARRIVE.get()
        if arrive is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ModelError(
                f"expected a residual stream of shape (batch, tokens, width), the block gave {shape}"
            )
        new = arrive(site, hidden)
        if new is hidden:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return after_block


def accepted_arguments(model: PreTrainedModel) -> set[str]:
    """Returns the names that the model's own `forward` takes."""
    return set(inspect.signature(model.forward).parameters)


def cache_argument(model: PreTrainedModel) -> str:
    """Returns under which name the model's `forward` takes its cache."""
    accepted = accepted_arguments(model)
    for name in ("past_key_values", "cache_params"):
        if name in accepted:
            return name
    raise ModelError(
        f"model type {model.config.model_type!r} is not supported: its forward takes no cache"
    )


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
    return str(packaged.resolve(reference)) if packaged.is_packaged(reference) else reference


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

    Raises:
        ModelError: the base or adapter is missing or cannot be loaded; the message names the model.
    """
    if ref.base is None:
        raise ModelError(
            f"model {name!r} was passed in loaded and has no path or id to load it from"
        )
    if base is None:
        options = {
            "revision": ref.revision,
            "subfolder": ref.subfolder,
            "device_map": device_map,
            **kwargs,
        }
        options = {key: value for key, value in options.items() if value is not None}
        try:
            base = AutoModelForCausalLM.from_pretrained(
                locate(ref.base),
                dtype=ref.dtype or dtype or "auto",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                **options,
            )
        except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(
                f"model {name!r} cannot be loaded from {ref.base!r}: {first_line(error)}"
            ) from error
    elif ref.adapter is not None:
        base = share_weights(base)
    return freeze(base if ref.adapter is None else _with_adapter(name, base, ref))


def _with_adapter(name: str, base: PreTrainedModel, ref: ModelRef) -> PreTrainedModel:
    try:
        import peft
    except ImportError:
        raise ModelError(
            f"model {name!r} has the adapter {ref.adapter!r}, which needs PEFT; run: pip install 'rc-agents[train]'"
        ) from None
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
    """Returns the base's tokenizer, or None where it has none."""
    if ref.base is None:
        return None
    options = {"revision": ref.revision, "subfolder": ref.subfolder}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        return AutoTokenizer.from_pretrained(
            locate(ref.base), trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def fingerprint(ref: ModelRef, model: PreTrainedModel | None = None) -> str:
    """Returns a hash that tells one base from another.

    Of a directory: its weight files and its adapter's weights and config. Of a hub id: the id and the commit that was
    loaded. Of a live model: its weights. Never of merged tensors, which differ between math libraries.
    """
    digest = hashlib.sha256()
    if ref.base is None:
        if model is None:
            raise ModelError(
                "a model without path or id can only be fingerprinted while it is loaded"
            )
        return "weights:" + weights_hash(model)
    parts = [(ref.base, ref.revision, ref.subfolder or "", "config.json")]
    if ref.adapter is not None:
        parts.append((ref.adapter, ref.adapter_revision, "", "adapter_config.json"))
    for part, revision, subfolder, file in parts:
        if packaged.is_packaged(part):
            digest.update(f"{part}@{packaged.fingerprint(part)}".encode())
        elif Path(part).is_dir():
            _hash_folder(digest, Path(part) / subfolder)
        else:
            digest.update(f"{part}@{_commit(part, revision, str(Path(subfolder) / file))}".encode())
    return "files:" + digest.hexdigest()


def _commit(repo_id: str, revision: str | None, file: str) -> str:
    """Returns the commit of a hub repository that lies in the cache, by a file that was loaded from it."""
    found = try_to_load_from_cache(repo_id, file, revision=revision or "main")
    commit = re.search(r"snapshots[/\\]([0-9a-f]{40})", found) if isinstance(found, str) else None
    return commit[1] if commit else revision or "main"


def _hash_folder(digest: Any, folder: Path) -> None:
    files = [*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")]
    for path in sorted(files):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)


def weights_hash(model: nn.Module) -> str:
    """Returns the SHA-256 of all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_finite(name: str, model: PreTrainedModel) -> None:
    """Raises `ModelError` when a weight is NaN or infinite, naming the model and the tensor."""
    for path, tensor in model.named_parameters():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        values = tensor.detach()
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            raise ModelError(
                f"model {name!r} has NaN or infinite weights in {path!r}; load it again or replace it"
            )


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
