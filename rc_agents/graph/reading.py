"""Texts as each node reads them, in its own tokens and padded on the left; and what encoders are shown."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, TokenError, nearest


class Shown:
    """What an encoder is shown in place of one text. Two are equal whose tensors are.

    Args:
        inputs: what the encoder's own `forward` takes, with one row each, such as `pixel_values` (1, C, H, W).
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = dict(inputs)
        digest = hashlib.sha256()
        for name, value in sorted(self.inputs.items()):
            digest.update(f"{name} {getattr(value, 'dtype', '')} {_shape(value)}".encode())
            whole = isinstance(value, Tensor)
            digest.update(
                value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                if whole
                else repr(value).encode()
            )
        self.digest = digest.hexdigest()

    def __str__(self) -> str:
        return f"shown:{self.digest}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shown) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: Any) -> Shown:
        return self


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else repr(value)[:200]


Read = str | Shown
"""What a node reads of one example."""
Texts = Sequence[str] | Mapping[str, Sequence[Read | Mapping[str, Any]]]
"""The same texts for every node, or by node its texts, or what it is shown."""


def texts_of(
    texts: Texts, names: Sequence[str], encoders: Collection[str] = ()
) -> dict[str, list[Any]]:
    """Returns what each node reads: texts, or for an encoder what it is shown.

    Args:
        texts: of all nodes.
        names: of the nodes.
        encoders: those among them that read no text.

    Raises:
        InputError: no text, an empty one, one text in place of a list, a node without texts, or unequal counts.
    """
    _check_given(texts, names, encoders)
    found = {name: list(texts[name] if isinstance(texts, Mapping) else texts) for name in names}
    _check_counts(found)
    for name, each in found.items():
        if name in encoders:
            found[name] = [_shown(name, place, one) for place, one in enumerate(each)]
            continue
        for place, text in enumerate(each):
            if not isinstance(text, str) or not text:
                raise InputError(
                    f"text {place} of node {name!r} is {_said(text)}; expected text that is not empty"
                )
    return found


def _check_given(texts: Texts, names: Sequence[str], encoders: Collection[str]) -> None:
    """Raises `InputError` unless there is a list for all nodes, or one by node."""
    if isinstance(texts, str):
        raise InputError(
            "texts is a list of texts, or a mapping of lists by node; got one text: put it in a list"
        )
    if encoders and not isinstance(texts, Mapping):
        raise InputError(
            f"node {min(encoders)!r} is an encoder and reads no text; give every node what it reads: "
            f"{{{min(encoders)!r}: [{{...}}], ...}}"
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


def _check_counts(found: Mapping[str, Sequence[Any]]) -> None:
    """Raises `InputError` unless all nodes read as many, and something."""
    counts = {name: len(each) for name, each in found.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"every node reads as many texts as the others, got {shown}")
    if not any(counts.values()):
        raise InputError("no texts; pass at least one")


def _said(text: Any) -> str:
    said = repr(text)
    return said if len(said) < 60 else f"{said[:60]}..."


def _shown(name: str, place: int, given: Any) -> Shown:
    if isinstance(given, Shown):
        return given
    if not isinstance(given, Mapping):
        raise InputError(
            f"entry {place} of node {name!r}, an encoder, is {_said(given)}; expected its inputs by name, as its "
            "image or feature processor returns them for one"
        )
    return Shown(given)


def together(name: str, shown: Sequence[Shown]) -> dict[str, Any]:
    """Returns what an encoder is shown as one batch.

    Raises:
        InputError: entries of several rows, or of unlike names or sizes.
    """
    first = shown[0].inputs
    for place, one in enumerate(shown):
        like = one.inputs.keys() == first.keys() and all(
            _shape(value) == _shape(first[key]) for key, value in one.inputs.items()
        )
        if not any(isinstance(value, Tensor) for value in one.inputs.values()):
            raise InputError(
                f"entry {place} of node {name!r} holds no tensor, but {_described(one)}; ask the processor for them "
                "with return_tensors='pt'"
            )
        rows = {len(value) for value in one.inputs.values() if isinstance(value, Tensor)}
        if not like or rows != {1}:
            raise InputError(
                f"entry {place} of node {name!r} is {_described(one)}, and the first {_described(shown[0])}; give one "
                "row each, all of one size"
            )
    return {
        key: torch.cat([one.inputs[key] for one in shown]) if isinstance(value, Tensor) else value
        for key, value in first.items()
    }


def _described(shown: Shown) -> str:
    return ", ".join(
        f"{key} {_shape(value) if isinstance(value, Tensor) else type(value).__name__}"
        for key, value in shown.inputs.items()
    )


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
