"""Tokens as bytes of text, so that two tokenizations of one text can be laid side by side."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from ..errors import TokenError
from .rules import SPACE, adds_prefix, drops_first_space, is_sentencepiece, without_prefix

Piece = tuple[int, int]
"""A token and the byte of its text at which it ends."""


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
    return bool(_rules(one) == _rules(other))


def _rules(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    rules = json.loads(backend.to_str())
    return {key: rules.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}


def check_spells(tokenizer: Any, name: str) -> dict[str, Any]:
    """Returns a tokenizer's own description; raises `TokenError` where its tokens cannot be read as bytes of text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__
        raise TokenError(
            f"the tokenizer of {name!r} ({kind}) is no fast tokenizer; alignment='span' needs one"
        )
    rules: dict[str, Any] = json.loads(backend.to_str())
    decoder = rules.get("decoder") or {}
    if not _is_byte_level(decoder) and not is_sentencepiece(decoder):
        raise TokenError(
            f"the tokenizer of {name!r} has a decoder of type {decoder.get('type', 'none')!r}; alignment='span' "
            "understands byte-level BPE and sentencepiece tokenizers"
        )
    return rules


def _is_byte_level(decoder: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(decoder)


class TokenBytes:
    """Knows which bytes of text every token stands for, and tokenizes text without adding special tokens.

    Byte-level BPE and sentencepiece-like tokenizers (byte fallback included) are understood. Special tokens stand for
    no text, and text that spells a special token is tokenized as the text it is.

    Args:
        tokenizer: a Hugging Face fast tokenizer; it is left as it is.
        name: of its model, for messages.

    Attributes:
        pieces: id -> bytes.
        lead: the special tokens that the tokenizer puts before a text.
        rules: the tokenizer's own description.

    Raises:
        TokenError: any other kind of tokenizer.
    """

    def __init__(self, tokenizer: Any, name: str = "model") -> None:
        self.rules = check_spells(tokenizer, name)
        self.tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        description = backend.to_str()
        decoder = self.rules.get("decoder") or {}
        byte_level = _is_byte_level(decoder)
        self.drops_first_space = not byte_level and drops_first_space(decoder)
        self.pieces = _pieces(tokenizer, self.rules, _byte_level if byte_level else _sentencepiece)
        self.lead = _lead(backend)
        self._start = _plain(Tokenizer.from_str(description))
        self._later = self._start
        if adds_prefix(self.rules):
            self._later = _plain(Tokenizer.from_str(json.dumps(without_prefix(self.rules))))

    def of(self, ids: Sequence[int]) -> list[bytes]:
        """Returns the bytes of every token of one sequence; their concatenation is the text."""
        pieces = [self.pieces.get(index, b"") for index in ids]
        if self.drops_first_space:
            first = next((k for k, piece in enumerate(pieces) if piece), None)
            if first is not None and pieces[first].startswith(b" "):
                pieces[first] = pieces[first][1:]
        return pieces

    def split(self, parts: Sequence[bytes], *, first: bool) -> list[tuple[Piece, ...]]:
        """Tokenizes pieces of valid UTF-8, each on its own.

        Args:
            parts: the texts.
            first: whether they begin a text; a tokenizer that puts a space before a text does so only there.

        Returns:
            For each part its tokens with the byte of the part at which they end.
        """
        texts = [part.decode() for part in parts]
        encoded = (self._start if first else self._later).encode_batch(
            texts, add_special_tokens=False
        )
        return [self._ended(text, item, first) for text, item in zip(texts, encoded, strict=True)]

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        """Tokenizes a rendered template, names of special tokens being these; adds none.

        Returns:
            Each token with the characters at which it starts and stops.
        """
        encoded = self._rendered.encode(text, add_special_tokens=False)
        return [(token, *span) for token, span in zip(encoded.ids, encoded.offsets, strict=True)]

    @cached_property
    def begins_anew(self) -> bool:
        """Whether text behind a special token is tokenized as at the start of a text."""
        added = self.rules.get("added_tokens") or []
        name = next((token["content"] for token in added if token["special"]), "")
        behind = self._rendered.encode(name + "a", add_special_tokens=False).ids
        return bool(name) and behind[1:] == [
            token for token, _ in self.split([b"a"], first=True)[0]
        ]

    @cached_property
    def _rendered(self) -> Tokenizer:
        """The tokenizer without what it does behind its model, such as to trim the offsets of spaces."""
        return _steady(Tokenizer.from_str(json.dumps({**self.rules, "post_processor": None})))

    def _ended(self, text: str, item: Any, first: bool) -> tuple[Piece, ...]:
        pieces = self.of(item.ids) if first else [self.pieces.get(index, b"") for index in item.ids]
        if b"".join(pieces) != text.encode():
            return tuple(zip(item.ids, _ends_by_offset(text, item.offsets, pieces), strict=True))
        total, ended = 0, []
        for index, piece in zip(item.ids, pieces, strict=True):
            total += len(piece)
            ended.append((index, total))
        return tuple(ended)


def _ends_by_offset(
    text: str, offsets: Sequence[tuple[int, int]], pieces: Sequence[bytes]
) -> list[int]:
    """End bytes where the tokens do not spell the text: their own lengths where they fit, else character offsets."""
    data, at = text.encode(), [0]
    for char in text:
        at.append(at[-1] + len(char.encode()))
    ends, last = [], 0
    for (start, end), piece in zip(offsets, pieces, strict=True):
        begin = max(last, at[start])
        stop = begin + len(piece)
        spelled = piece and stop <= at[end] and data[begin:stop] == piece
        last = stop if spelled else max(last, at[end])
        ends.append(last)
    return ends


def _pieces(tokenizer: Any, rules: dict[str, Any], piece: Any) -> dict[int, bytes]:
    special = set(tokenizer.all_special_ids)
    added = {token["id"]: token["special"] for token in rules.get("added_tokens") or []}
    pieces = {}
    for token, index in tokenizer.get_vocab().items():
        if index in special or added.get(index):
            pieces[index] = b""
        else:
            pieces[index] = token.encode() if index in added else piece(token)
    return pieces


def _lead(backend: Tokenizer) -> list[int]:
    encoded = backend.encode("a", add_special_tokens=True)
    lead = []
    for index, special, real in zip(
        encoded.ids, encoded.special_tokens_mask, encoded.attention_mask, strict=True
    ):
        if not special:
            break
        if real:
            lead.append(index)
    return lead


def _plain(backend: Tokenizer) -> Tokenizer:
    """Makes a tokenizer steady, and read the names of special tokens as text."""
    backend.encode_special_tokens = True
    return _steady(backend)


def _steady(backend: Tokenizer) -> Tokenizer:
    """Makes a tokenizer pad nothing, cut nothing, draw nothing."""
    backend.no_padding()
    backend.no_truncation()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    return backend


def _byte_level(token: str) -> bytes:
    return (
        bytes(_ALPHABET[char] for char in token)
        if all(c in _ALPHABET for c in token)
        else token.encode()
    )


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
