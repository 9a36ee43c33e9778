"""What a coupled pass is called with, checked before any model runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..alignment import Chat
from ..errors import InputError, nearest

IGNORED = {
    "assistant_tokenizer",
    "cache_position",
    "is_first_iteration",
    "next_sequence_length",
    "num_items_in_batch",
    "tokenizer",
}
"""What `generate` and `Trainer` pass along and a pass has no use for, or uses with the labels alone."""


def check_ids(input_ids: Any, inputs_embeds: Any, vocab_size: int) -> Tensor:
    """Raises `InputError` unless `input_ids` are (B, T) tokens of the anchor's; returns them."""
    if inputs_embeds is not None:
        raise InputError(
            "inputs_embeds is refused: every model embeds the text itself; pass input_ids"
        )
    if not isinstance(input_ids, Tensor):
        kind = type(input_ids).__name__
        raise InputError(f"input_ids is a tensor of shape (batch, tokens), got {kind}")
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise InputError(
            f"input_ids is an integer tensor of shape (batch, tokens), "
            f"got {input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    if 0 in input_ids.shape:
        shape = tuple(input_ids.shape)
        raise InputError(f"input_ids is empty, shape {shape}; pass at least one token")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"input_ids holds {low if low < 0 else high}, outside the anchor's vocabulary "
            f"0..{vocab_size - 1}; tokenize with model.tokenizer"
        )
    return input_ids


def check_known(arguments: Iterable[str], forward: Callable[..., Any]) -> None:
    """Raises `InputError` for arguments that a coupled `forward` does not take."""
    unknown = sorted(set(arguments) - IGNORED)
    if unknown:
        known = nearest(unknown[0], inspect.signature(forward).parameters)
        raise InputError(f"forward got an unknown argument {unknown[0]!r}; {known}")


def check_mask(mask: Any, input_ids: Tensor, past: int) -> Tensor | None:
    """Raises `InputError` unless the mask has one column a token, those in the cache included; returns it.

    Args:
        mask: (B, P + T), or None.
        input_ids: (B, T).
        past: tokens in the cache, P.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask is a 2-D tensor of ones and zeros, one column a token; got {shape}"
        )
    expected = (input_ids.shape[0], past + input_ids.shape[1])
    if tuple(mask.shape) != expected:
        cached = f", {past} of them in the cache" if past else ""
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, expected {expected}: "
            f"{expected[1]} tokens{cached}"
        )
    return mask


def check_rows(cached_ids: Tensor | None, input_ids: Tensor) -> None:
    """Raises `InputError` unless a cache holds as many rows as the new tokens."""
    if cached_ids is not None and len(cached_ids) != len(input_ids):
        raise InputError(
            f"past_key_values holds {len(cached_ids)} rows and input_ids has {len(input_ids)}; "
            "pass the rows that the cache was filled with"
        )


def check_chats(chats: Any, num_rows: int) -> list[Chat | None] | None:
    """Raises `InputError` unless each row has a chat or None; returns them, repeated where a call repeats rows."""
    if chats is None:
        return None
    if not isinstance(chats, Sequence) or not all(
        one is None or isinstance(one, Chat) for one in chats
    ):
        raise InputError(
            f"chats is what model.chat_inputs returned under this name, got {chats!r:.60}"
        )
    copies, rest = divmod(num_rows, max(1, len(chats)))
    if rest or not chats:
        raise InputError(f"chats has {len(chats)} entries for a batch of {num_rows} rows")
    return [chat for chat in chats for _ in range(copies)]


def check_positions(position_ids: Any, input_ids: Tensor) -> Tensor | None:
    """Raises `InputError` unless there is one position a token; returns them, (B, T)."""
    if position_ids is None:
        return None
    expected = tuple(input_ids.shape)
    if not isinstance(position_ids, Tensor):
        kind = type(position_ids).__name__
        raise InputError(f"position_ids is a tensor of shape {expected}, got {kind}")
    shape = tuple(position_ids.shape)
    if shape not in (expected, (1, expected[1])):
        raise InputError(f"position_ids has shape {shape}, expected {expected}: one a token")
    places: Tensor = position_ids.expand(expected)
    return places


def check_labels(
    labels: Any, input_ids: Tensor, logits_to_keep: int | Tensor, vocab_size: int
) -> None:
    """Raises `InputError` unless every token has a label that exists, and a logit to score it by."""
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != input_ids.shape:
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(
            f"labels has shape {shape}, expected {tuple(input_ids.shape)}: one a token"
        )
    scored = labels[labels != -100]
    if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < vocab_size:
        wrong = int(scored.min()) if int(scored.min()) < 0 else int(scored.max())
        raise InputError(
            f"labels holds {wrong}, outside the anchor's vocabulary 0..{vocab_size - 1}; -100 is not scored"
        )
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise InputError("labels need the logits of every token; leave out logits_to_keep")


def positions(mask: Tensor | None, input_ids: Tensor, past: int) -> Tensor | None:
    """Returns the positions of new tokens, (B, T): counted along the mask, or on from the cache.

    None at the start of a text without a mask, where every model counts from 0 by itself.
    """
    if mask is not None:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    if not past:
        return None
    return torch.arange(past, past + input_ids.shape[1], device=input_ids.device).expand_as(
        input_ids
    )
