"""Tokens' log-probabilities and contributions in OpenAI's two forms, and in ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rc_agents.service import GenerationResult, TokenRecord

from .serving import Serving


def chat_logprobs(serving: Serving, result: GenerationResult) -> dict[str, Any]:
    """Returns `logprobs` of a chat's choice."""
    content = []
    for one in result.tokens:
        top = [_shown(serving, token, value) for token, value in one.top]
        content.append({**_shown(serving, one.token, one.logprob or 0.0), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _shown(serving: Serving, token: int, logprob: float) -> dict[str, Any]:
    text = piece(serving, token)
    whole = "\N{REPLACEMENT CHARACTER}" not in text  # else it is part of a character
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def text_logprobs(serving: Serving, records: Sequence[TokenRecord]) -> dict[str, Any]:
    """Returns `logprobs` of a completion's choice."""
    texts = [piece(serving, one.token) for one in records]
    offsets = [sum(map(len, texts[:place])) for place in range(len(texts))]
    top: list[dict[str, float] | None] = [
        {piece(serving, token): value for token, value in one.top}
        if one.logprob is not None
        else None
        for one in records
    ]
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in records],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def contributions(serving: Serving, result: GenerationResult) -> list[dict[str, Any]]:
    """Returns, for each token, how much every specialist added to the anchor's stream where it was chosen."""
    return [
        {"token": piece(serving, one.token), "specialists": dict(one.contributions)}
        for one in result.tokens
    ]


def piece(serving: Serving, token: int) -> str:
    """Returns a token's text."""
    return str(serving.service.model.tokenizer.decode([token]))
