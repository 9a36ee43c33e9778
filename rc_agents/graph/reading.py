"""Texts as each node reads them: in its own tokens, padded on the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, TokenError, nearest

Texts = Sequence[str] | Mapping[str, Sequence[str]]
"""The same texts for every node, or texts by node."""


def texts_of(texts: Texts, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns each node's texts.

    Raises:
        InputError: no text, an empty one, one text in place of a list, a node without texts, or unequal counts.
    """
    if isinstance(texts, str):
        raise InputError(
            "texts is a list of texts, or a mapping of lists by node; got one text: put it in a list"
        )
    if isinstance(texts, Mapping):
        for name in texts:
            if name not in names:
                raise InputError(
                    f"texts are given for an unknown node {name!r}; {nearest(name, names)}"
                )
        missing = [name for name in names if name not in texts]
        if missing:
            raise InputError(
                f"no texts for node {missing[0]!r}; give every node its own, or one list for all"
            )
    found = {name: list(texts[name] if isinstance(texts, Mapping) else texts) for name in names}
    counts = {name: len(each) for name, each in found.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"every node reads as many texts as the others, got {shown}")
    for name, each in found.items():
        if not each:
            raise InputError("no texts; pass at least one")
        for place, text in enumerate(each):
            if not isinstance(text, str) or not text:
                raise InputError(
                    f"text {place} of node {name!r} is {text!r}; expected text that is not empty"
                )
    return found


def tokenize(
    name: str, tokenizer: Any, texts: Sequence[str], limit: int | None
) -> dict[str, Tensor]:
    """Returns `input_ids` and `attention_mask`, (B, T), padded on the left.

    Args:
        name: of the node, for messages.
        tokenizer: its own.
        texts: not empty.
        limit: tokens that the node's model was made for; None where it has no limit.

    Raises:
        TokenError: the node has no tokenizer.
        InputError: a text of no token, or of more than `limit`.
    """
    if tokenizer is None:
        raise TokenError(
            f"node {name!r} has no tokenizer to read text with; pass tokenizers={{{name!r}: ...}}"
        )
    rows = [tokenizer(text).input_ids for text in texts]
    width = max(map(len, rows))
    if not all(rows):
        place = next(place for place, row in enumerate(rows) if not row)
        raise InputError(f"text {place} of node {name!r} has no token: {texts[place]!r}")
    if limit is not None and width > limit:
        raise InputError(
            f"a text of {width} tokens is longer than the {limit} that node {name!r} reads; shorten it"
        )
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for place, row in enumerate(rows):
        ids_BT[place, width - len(row) :] = torch.tensor(row)
        mask_BT[place, width - len(row) :] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}
