"""Texts as sets of shingles: what stands from the start of each word on, a few words long.

Shapes: B bytes of all texts, W words of all texts, S distinct shingles of all texts.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDTH = 16  # bytes of a shingle: about three English words
_ASCII_BREAKS = bytes(byte for byte in range(128) if not chr(byte).isalnum())
_TO_SPACE = bytes.maketrans(_ASCII_BREAKS, b" " * len(_ASCII_BREAKS))
_IDEOGRAPH = 0xE0  # lead bytes from here on: scripts that may not put spaces between words
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)  # odd, of the golden ratio and of xxHash


def normalise(text: str) -> bytes:
    """Returns a text's words in lower case, one space apart; its own bytes where it has no word."""
    folded = unicodedata.normalize("NFKC", text).casefold().encode(errors="surrogatepass")
    return b" ".join(folded.translate(_TO_SPACE).split()) or text.strip().encode(
        errors="surrogatepass"
    )


@dataclass(frozen=True)
class Shingles:
    """The shingles of texts, numbered from the rarest to the commonest, in that order within each text.

    Attributes:
        ranks: (S) the shingles' numbers, text after text.
        starts: (number of texts + 1) where each text's lie in `ranks`.
        counts: how many texts have the shingle of a number.
    """

    ranks: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many shingles each text has."""
        return np.diff(self.starts)


def shingles(texts: Sequence[bytes]) -> Shingles:
    """Returns the shingles of normalised texts.

    A shingle is the WIDTH bytes from the start of a word, so that one changed word costs a text about
    three of them; in a script without spaces every character starts one. They are told apart by 64-bit
    hashes.
    """
    gap = bytes(WIDTH)
    joined_B = np.frombuffer(b"".join(text + gap for text in texts), np.uint8)
    lengths = np.fromiter((len(text) + WIDTH for text in texts), np.int64, len(texts))
    words_W = _word_starts(joined_B)
    owners_W = np.searchsorted(np.cumsum(lengths), words_W, side="right")
    hashes, ids_W = np.unique(_hashes(joined_B, words_W), return_inverse=True)
    spread = max(len(hashes), 1)
    owners_S, ids_S = np.divmod(distinct(owners_W * spread + ids_W), spread)
    counts = np.bincount(ids_S, minlength=len(hashes))
    rarest_first = np.argsort(counts, kind="stable")
    rank_of = np.empty_like(rarest_first)
    rank_of[rarest_first] = np.arange(len(hashes))
    ranks_S = np.sort(owners_S * spread + rank_of[ids_S]) % spread
    starts = np.searchsorted(owners_S, np.arange(len(texts) + 1))
    return Shingles(ranks_S, starts, counts[rarest_first])


def distinct(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the different ones, ascending: `numpy.unique`, but quick where most of them differ."""
    ordered = np.sort(numbers)
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new]


def _word_starts(joined_B: NDArray[np.uint8]) -> NDArray[np.int64]:
    breaks_B = (joined_B == 0) | (joined_B == ord(" "))
    after_break_B = np.ones(len(joined_B), bool)
    after_break_B[1:] = breaks_B[:-1]
    return np.flatnonzero(~breaks_B & (after_break_B | (joined_B >= _IDEOGRAPH)))


def _hashes(joined_B: NDArray[np.uint8], words_W: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns a 64-bit hash of the WIDTH bytes from each word on."""
    windows = np.lib.stride_tricks.sliding_window_view(joined_B, WIDTH)[words_W]
    halves = np.ascontiguousarray(windows).view("<u8").astype(np.uint64)
    mixed = np.zeros(len(words_W), np.uint64)
    for half, factor in zip(halves.T, _FACTORS, strict=True):
        mixed = (mixed ^ half) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(29)
    return mixed
