"""What aligning two tokenizers costs, counted: `python -m tests.count_alignment package:smollm2-135m tiny:metaspace`.

Prints one line for each kind of text and each of the two as the anchor (docs/alignment.md has the meaning).
"""

import sys
from bisect import bisect_left
from itertools import pairwise

from transformers import AutoTokenizer

from rc_agents import packaged
from rc_agents.alignment import Clock, Row, Segments, TokenBytes
from rc_agents.alignment.segments import Segment
from tests.tiny_tokenizers import tiny_tokenizer

NUM_DOCUMENTS = {"general": 60, "python": 6}
NUM_CHARACTERS = 8000  # of each document


def segments_of(name: str) -> Segments:
    """The tokenizer `package:NAME`, `tiny:KIND`, a folder or a hub id."""
    if name.startswith("tiny:"):
        return Segments(TokenBytes(tiny_tokenizer(name.removeprefix("tiny:")), name))
    folder = packaged.resolve(name) if packaged.is_packaged(name) else name
    return Segments(TokenBytes(AutoTokenizer.from_pretrained(folder), name))


def count(anchor: Segments, specialist: Segments, texts: list[str]) -> dict[str, float]:
    """Counts over some texts.

    Returns:
        columns: the anchor's tokens with text.
        branches: share of them at which the text so far ends in other tokens than the whole text has.
        more: branch tokens for every main token.
        other: share of a line's tokens that the whole text does not have.
        ahead: share of the specialist's token ends at which the anchor's tokens up to there were chosen by later text.
    """
    columns = branched = aside = main = line = other = ends = ahead = 0
    for text in texts:
        clock, tree, append = Clock(), Row(specialist), Row(specialist)
        ids = [index for index, _ in anchor.tokenize(text.encode())]
        clock.extend(anchor.tokens, ids, [1] * len(ids))
        branch, speakers = tree.follow(clock, 0, tree=True)
        append.follow(clock, 0, tree=False)
        columns += sum(who >= 0 for who in speakers)
        branched += sum(who >= len(tree.pieces) for who in speakers)
        aside, main, line = (
            aside + len(branch.pieces),
            main + len(tree.pieces),
            line + len(append.pieces),
        )
        other += len(set(append.pieces) - set(tree.pieces))
        stops = sorted({end for _, end in tree.pieces} & {*_boundaries(text)})
        ends += len(stops)
        ahead += sum(_looked_ahead(anchor, text.encode(), stops))
    return {
        "columns": columns,
        "branches": branched / columns,
        "more": aside / main,
        "other": other / line,
        "ahead": ahead / ends,
    }


def _boundaries(text: str) -> list[int]:
    """The bytes at which characters end."""
    at, ends = 0, []
    for char in text:
        at += len(char.encode())
        ends.append(at)
    return ends


def _looked_ahead(anchor: Segments, text: bytes, stops: list[int]) -> list[bool]:
    """Whether the tokens up to a byte differ from those of the text up to there alone, for every byte."""
    whole, starts = anchor.tokenize(text), anchor.starts(text)
    found = []
    for stop in stops:
        start = starts[bisect_left(starts, stop) - 1]
        (alone,) = anchor.of([Segment(text[start:stop], start == 0)])
        first = bisect_left(whole, start + 1, key=lambda piece: piece[1])
        kept = [piece for piece in whole[first : first + len(alone) + 1] if piece[1] <= stop]
        found.append(kept != [(index, start + end) for index, end in alone])
    return found


def main() -> None:
    """Prints the table."""
    names = sys.argv[1:] or ["package:smollm2-135m", "tiny:metaspace"]
    tokenizers = {name: segments_of(name) for name in names}
    for kind, number in NUM_DOCUMENTS.items():
        texts = [text[:NUM_CHARACTERS] for text in packaged.text(kind)[:number]]
        for pair in [*pairwise(names), *pairwise(names[::-1])]:
            found = count(*(tokenizers[name] for name in pair), texts)
            shares = ", ".join(
                f"{key} {value:.1%}" for key, value in found.items() if key != "columns"
            )
            print(
                f"{kind}: anchor {pair[0]}, specialist {pair[1]}: {found['columns']} columns, {shares}"
            )


if __name__ == "__main__":
    main()
