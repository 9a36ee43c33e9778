"""Tokens as bytes of text, so that two tokenizations of one text can be laid side by side."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

from ..errors import TokenError

SPACE = "\u2581"  # sentencepiece's visible space


def _same_length(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "?" * (error.end - error.start), error.end


codecs.register_error("rc_agents_same_length", _same_length)


def readable(data: bytes) -> str:
    """Decodes UTF-8 without moving a byte: an unfinished character at the end waits, a broken byte reads '?'."""
    return codecs.getincrementaldecoder("utf-8")("rc_agents_same_length").decode(data, final=False)


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids for every text."""
    if one is other:
        return True
    if one is None or other is None or len(one) != len(other):
        return False
    return _rules(one) == _rules(other)


def _rules(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    rules = json.loads(backend.to_str())
    return {key: rules.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}


class TokenBytes:
    """Knows which bytes of text every token of a tokenizer stands for.

    Byte-level BPE and sentencepiece-like tokenizers (byte fallback included) are understood.
    Special tokens stand for no text.

    Raises:
        TokenError: any other kind of tokenizer.
    """

    def __init__(self, tokenizer: Any, name: str = "model") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TokenError(f"the tokenizer of {name!r} is no fast tokenizer; alignment='span' needs one")
        self.tokenizer = tokenizer
        rules = json.loads(backend.to_str())
        decoder = json.dumps(rules.get("decoder") or {})
        self.drops_first_space = False
        if '"ByteLevel"' in decoder:
            piece = _byte_level
        elif '"Metaspace"' in decoder or SPACE in decoder:
            piece = _sentencepiece
            self.drops_first_space = '"Strip"' in decoder or '"Metaspace"' in decoder
        else:
            kind = (rules.get("decoder") or {}).get("type", "none")
            raise TokenError(
                f"the tokenizer of {name!r} has a decoder of type {kind!r}; alignment='span' understands "
                "byte-level BPE and sentencepiece tokenizers"
            )
        special = set(tokenizer.all_special_ids)
        added = {token["id"]: token for token in rules.get("added_tokens") or []}
        self.pieces: dict[int, bytes] = {}
        for token, index in tokenizer.get_vocab().items():
            if index in special or (index in added and added[index]["special"]):
                self.pieces[index] = b""
            elif index in added:
                self.pieces[index] = token.encode()
            else:
                self.pieces[index] = piece(token)

    def of(self, ids: Sequence[int]) -> list[bytes]:
        """Returns the bytes of every token of one sequence; their concatenation is the text."""
        pieces = [self.pieces.get(index, b"") for index in ids]
        if self.drops_first_space:
            first = next((k for k, piece in enumerate(pieces) if piece), None)
            if first is not None and pieces[first].startswith(b" "):
                pieces[first] = pieces[first][1:]
        return pieces

    def ends(self, ids: Sequence[int]) -> list[int]:
        """Returns for every token the byte of the text at which it ends."""
        total, ends = 0, []
        for piece in self.of(ids):
            total += len(piece)
            ends.append(total)
        return ends

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Returns ids and end bytes of each text; a leading special token stays, trailing ones do not."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        encoded = backend.encode_batch(list(texts), add_special_tokens=True)
        return [self._sequence(text, item) for text, item in zip(texts, encoded, strict=True)]

    def _sequence(self, text: str, item: Any) -> tuple[list[int], list[int]]:
        ids = list(item.ids)
        while ids and item.special_tokens_mask[len(ids) - 1]:
            ids.pop()
        if b"".join(self.of(ids)) == text.encode():
            return ids, self.ends(ids)
        return ids, _ends_by_offset(text, item.offsets[: len(ids)])


def _ends_by_offset(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """End bytes where a normaliser changed the text, from the tokenizer's own character offsets."""
    at = [0]
    for char in text:
        at.append(at[-1] + len(char.encode()))
    ends, last = [], 0
    for _, end in offsets:
        last = max(last, at[end])
        ends.append(last)
    return ends


def _byte_level(token: str) -> bytes:
    return bytes(_ALPHABET[char] for char in token) if all(c in _ALPHABET for c in token) else token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's reversible map of bytes to printable characters, read backwards."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}


_ALPHABET = _byte_alphabet()
