"""Tokenizing a growing text at the cost of its new part: the text is cut where its tokens are settled.

A cut lies behind a letter or digit, before a character that no token of the vocabulary holds next to it. No merge
crosses it, and pre-tokenizers that look ahead over white space or digits only find the same words on both sides. So
each segment between cuts is tokenized alone and remembered; only the last one can still change as the text grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from .rules import SPACE, parts_of
from .tokens import Piece, TokenBytes

REMEMBERED = 1 << 16  # segments kept, most of them words

PROBES = (
    "The river came down from the hills in spring, and nobody's boat didn't move -- (see 3.14) \"so\".",
    "  two  spaces,\ttabs\t\tand\n\nlines \n  end  ",
    'def add(left: int, right=[1, 23, 456]) -> int:\n    """Adds."""\n    return left+right  # done\n\n\nx = 0x1F',
    "naïve café — “Straße” señor; здравствуй, мир! שלום עולם مرحبا 你好，世界 こんにちは 안녕하세요 ไทย",
    "🙂👩‍👩‍👧 e\u0301 \u00a0x\u3000y\u200bz A\u0308 ﬁ ½ 1234567890 CamelCaseHTMLText snake_case_name",
    "http://a.b/c?d=e&f#g <tag attr='v'>&amp;</tag> {{x}} ///// ===== ....",
)
"""Texts on which the cuts of a tokenizer are tried before they are trusted."""

CHARACTERS_STAY = {"Prepend", "Replace"}
WORDS_STAY = CHARACTERS_STAY | {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Precompiled", "Nmt"}


class Segment(NamedTuple):
    """A stretch of text that is tokenized alone.

    Attributes:
        begins: whether it begins its text.
        token: the special token that it spells, if any.
    """

    text: bytes
    begins: bool
    token: int | None = None


class Segments:
    """A tokenizer that works segment by segment.

    Args:
        tokens: the tokenizer.

    Attributes:
        cuts_at: `pairs` (behind a letter or digit, before any character that no token joins to it),
            `words` (between a letter and a space alone, for tokenizers whose normaliser changes
            characters or that look whole words up), or `nowhere` (the whole text is one segment).
    """

    def __init__(self, tokens: TokenBytes) -> None:
        self.tokens = tokens
        self._joined = {pair for piece in tokens.pieces.values() for pair in pairwise(piece)}
        self._memory: dict[tuple[bytes, bool], tuple[Piece, ...]] = {}
        self._cuts: dict[tuple[str, str], bool] = {}
        self.cuts_at = next(kind for kind in _candidates(tokens.rules) if self._holds(kind))

    def starts(self, text: bytes, start: int = 0) -> list[int]:
        """Returns where the segments of `text[start:]` begin, given that one begins at `start`."""
        if self.cuts_at == "nowhere" or len(text) - start < 2:
            return [start] if len(text) > start else []
        starts, at, before = [start], start, ""
        for char in text[start:].decode():
            if before and self._is_cut(before, char):
                starts.append(at)
            at += 1 if char < "\x80" else len(char.encode())
            before = char
        return starts

    def of(self, parts: Sequence[Segment]) -> list[tuple[Piece, ...]]:
        """Returns the tokens of every segment, with the byte of the segment at which they end."""
        if len(self._memory) > REMEMBERED:
            self._memory = {}
        memory = self._memory
        for first in (True, False):
            new = list(
                {
                    text
                    for text, begins, token in parts
                    if token is None and begins is first and (text, first) not in memory
                }
            )
            if new:
                split = self.tokens.split(new, first=first)
                memory.update(zip(((text, first) for text in new), split, strict=True))
        return [
            memory[text, begins] if token is None else ((token, len(text)),)
            for text, begins, token in parts
        ]

    def tokenize(self, text: bytes) -> list[Piece]:
        """Returns all tokens of a text, without special ones, with the byte at which each ends."""
        starts = self.starts(text)
        parts = [Segment(text[a:b], a == 0) for a, b in pairwise([*starts, len(text)])]
        found = zip(starts, self.of(parts), strict=True)
        return [(index, start + end) for start, pieces in found for index, end in pieces]

    def _is_cut(self, before: str, after: str) -> bool:
        known = self._cuts.get((before, after))
        if known is None:
            known = self._cuts[before, after] = self._judge(before, after)
        return known

    def _judge(self, before: str, after: str) -> bool:
        if self.cuts_at == "words":
            apart = before.isascii() and before.isalpha() and after == " "
        else:
            apart = (
                before.isalnum() and after != SPACE and (before.isalpha() or not after.isnumeric())
            )
        return apart and (before.encode()[-1], after.encode()[0]) not in self._joined

    def _holds(self, kind: str) -> bool:
        self.cuts_at, self._cuts = kind, {}
        whole = self.tokens.split([probe.encode() for probe in PROBES], first=True)
        return all(
            self.tokenize(probe.encode()) == list(pieces)
            for probe, pieces in zip(PROBES, whole, strict=True)
        )


def _candidates(rules: dict[str, Any]) -> list[str]:
    """The kinds of cut that a tokenizer's rules allow, the finest first."""
    normalizer, pre_tokenizer = parts_of(rules.get("normalizer")), rules.get("pre_tokenizer")
    steps = {step["type"] for step in normalizer}
    flagged = any(
        token["rstrip"] or token["single_word"] for token in rules.get("added_tokens") or []
    )
    if not steps <= WORDS_STAY or "(?<" in str(pre_tokenizer) or flagged:
        return ["nowhere"]
    model = rules["model"]
    plain = steps <= CHARACTERS_STAY and all(
        step["type"] != "Replace"
        or (step["pattern"].get("String"), step["content"]) == (" ", SPACE)
        for step in normalizer
    )
    whole_words = model.get("ignore_merges") or model["type"] not in ("BPE", "Unigram")
    fuses = (model.get("fuse_unk") or model["type"] == "Unigram") and not model.get("byte_fallback")
    return (
        ["pairs", "words", "nowhere"]
        if plain and not whole_words and not fuses
        else ["words", "nowhere"]
    )
