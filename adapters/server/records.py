"""Tokens' log-probabilities and contributions in OpenAI's two forms, and in ours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rc_agents.errors import TokenError
from rc_agents.service import GenerationResult, TokenRecord

from .serving import Serving


def chat_logprobs(serving: Serving, result: GenerationResult) -> dict[str, Any]:
    """Returns `logprobs` of a chat's choice."""
    content = []
    for one in _shown_ones(serving, result.tokens):
        top = [_shown(serving, token, value) for token, value in one.top]
        content.append({**_shown(serving, one.token, one.logprob or 0.0), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _shown(serving: Serving, token: int, logprob: float) -> dict[str, Any]:
    data = spelled(serving, token)
    return {"token": piece(serving, token), "logprob": logprob, "bytes": list(data)}


def _shown_ones(serving: Serving, records: Sequence[TokenRecord]) -> list[TokenRecord]:
    """The records without an end of text, which is no part of it."""
    ended = bool(records) and not spelled(serving, records[-1].token)
    return list(records[:-1] if ended else records)


def text_logprobs(serving: Serving, records: Sequence[TokenRecord]) -> dict[str, Any]:
    """Returns `logprobs` of a completion's choice."""
    kept = _shown_ones(serving, records)
    texts = [piece(serving, one.token) for one in kept]
    ends = list(itertools.accumulate(map(len, texts)))
    top: list[dict[str, float] | None] = [
        {piece(serving, token): value for token, value in one.top}
        if one.logprob is not None
        else None
        for one in kept
    ]
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in kept],
        "top_logprobs": top,
        "text_offset": [0, *ends[:-1]] if ends else [],
    }


def contributions(serving: Serving, result: GenerationResult) -> list[dict[str, Any]]:
    """Returns, for each token, how much every specialist added to the anchor's stream where it was chosen."""
    return [
        {"token": piece(serving, one.token), "specialists": dict(one.contributions)}
        for one in result.tokens
    ]


def spelled(serving: Serving, token: int) -> bytes:
    """Returns what a token spells; nothing for a special one."""
    try:
        return serving.service.token_bytes(token)
    except TokenError:  # of a kind that does not say; its text is near enough
        return str(
            serving.service.model.tokenizer.decode([token], skip_special_tokens=True)
        ).encode()


def piece(serving: Serving, token: int) -> str:
    """Returns a token as OpenAI shows it: part of a character as `bytes:\\xe2`, a special token by its name."""
    data = spelled(serving, token)
    if not data:
        return str(serving.service.model.tokenizer.decode([token]))
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{one:02x}" for one in data)
