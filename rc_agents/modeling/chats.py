"""Conversations in the anchor's tokens, with how each model's own chat template renders them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..alignment import Chat, Script
from ..alignment.renderings import Message, Rendering, locate, render
from ..alignment.script import write
from ..errors import InputError
from ..topology import ANCHOR

if TYPE_CHECKING:
    from .coupled import CoupledForCausalLM


def read(
    ensemble: CoupledForCausalLM, messages: Sequence[Message], template: Mapping[str, Any]
) -> tuple[list[int], Chat | None]:
    """Returns a conversation in the anchor's tokens, and how models with templates of their own read it.

    A model with its own tokenizer but without a template, or with one that cannot be laid beside the anchor's (then
    with a warning), reads the anchor's rendering as plain text.

    Args:
        messages: dicts with a `role` and a `content`, both strings.
        template: more variables for the templates.

    Raises:
        InputError: no messages, malformed ones, or an anchor without a template or whose template refuses them.
    """
    _check(messages)
    tokenizer = ensemble.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the anchor's tokenizer has no chat template; pass plain text, or set model.tokenizer.chat_template"
        )
    try:
        text = render(tokenizer, messages, template)
    except InputError as error:
        raise InputError(f"the anchor's {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    names = [
        name
        for name in ensemble.config.span_names
        if getattr(ensemble.tokenizers[name], "chat_template", None)
    ]
    return ids, _chat(ensemble, names, messages, template, ids) if names else None


def _chat(
    ensemble: CoupledForCausalLM,
    names: Sequence[str],
    messages: Sequence[Message],
    template: Mapping[str, Any],
    ids: Sequence[int],
) -> Chat | None:
    try:
        rendering = locate(ensemble.tokenizer, messages, template)
    except InputError as error:
        _warn(names, f"the anchor's {error}")
        return None
    own = {key: value for key, value in template.items() if key != "chat_template"}
    scripts = []
    for name in names:
        try:
            script = _script(ensemble, name, messages, own, rendering)
        except InputError as error:
            _warn([name], f"its {error}")
            continue
        if script.token_ids != tuple(ids):
            _warn([name], f"the tokenizer of {ANCHOR!r} gives other tokens than its own rules")
            continue
        scripts.append((name, script))
    return Chat(tuple(scripts)) if scripts else None


def _script(
    ensemble: CoupledForCausalLM,
    name: str,
    messages: Sequence[Message],
    template: Mapping[str, Any],
    rendering: Rendering,
) -> Script:
    own = locate(ensemble.tokenizers[name], messages, template)
    tokens = ensemble.reader(name).segments.tokens
    return write(ensemble.anchor_bytes(), rendering, tokens, own)


def _warn(names: Sequence[str], reason: str) -> None:
    who = " and ".join(map(repr, names))
    warnings.warn(
        f"model {who} reads this conversation as the anchor's text, without a chat template of its own: {reason}",
        stacklevel=2,
    )


def inputs_of(
    ensemble: CoupledForCausalLM, messages: Sequence[Any], template: Mapping[str, Any]
) -> dict[str, Any]:
    """Renders one conversation or several as arguments of a pass, left-padded; see `chat_inputs`."""
    several = (
        bool(messages) and isinstance(messages, Sequence) and not isinstance(messages[0], Mapping)
    )
    found = [read(ensemble, one, template) for one in (messages if several else [messages])]
    width = max(len(ids) for ids, _ in found)
    padding = min(ensemble.tokenizer.pad_token_id or 0, ensemble.config.vocab_size - 1)
    rows = [[padding] * (width - len(ids)) + ids for ids, _ in found]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in found]
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor(rows, device=ensemble.device),
        "attention_mask": torch.tensor(mask, device=ensemble.device),
    }
    if any(chat is not None for _, chat in found):
        inputs["chats"] = tuple(chat for _, chat in found)
    return inputs


def _check(messages: Any) -> None:
    if not isinstance(messages, Sequence) or not messages:
        raise InputError(f"a chat is a list of at least one message, got {messages!r:.60}")
    for message in messages:
        parts = (
            [message.get(key) for key in ("role", "content")]
            if isinstance(message, Mapping)
            else [None]
        )
        if not all(isinstance(part, str) for part in parts):
            raise InputError(
                f"a message is a dict with a role and a content, both strings, got {message!r:.120}"
            )
