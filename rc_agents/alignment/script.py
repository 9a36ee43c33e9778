"""A conversation as one model's own template renders it, laid beside the anchor's rendering."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

from .renderings import Rendering
from .tokens import TokenBytes


class Mark(NamedTuple):
    """A special token of a template: the bytes it is spelled with, and its id."""

    start: int
    stop: int
    token: int


@dataclass(frozen=True)
class Script:
    """What a model reads of a conversation, and when.

    Attributes:
        token_ids: the anchor's tokens of the conversation.
        sizes: how many bytes of `text` the model has read behind each of them.
        text: UTF-8 bytes of the model's own rendering.
        marks: its template's special tokens, rising. What is spelled like one in a message is text.
    """

    token_ids: tuple[int, ...]
    sizes: tuple[int, ...]
    text: bytes
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Chat:
    """How the models with their own templates read one conversation; the others read the anchor's text.

    Attributes:
        scripts: pairs of a model's name and its script.
    """

    scripts: tuple[tuple[str, Script], ...]

    def script(self, name: str) -> Script | None:
        """Returns what a model reads, None where it reads the anchor's text."""
        return dict(self.scripts).get(name)


def write(
    anchor: TokenBytes, rendering: Rendering, own_tokens: TokenBytes, own_rendering: Rendering
) -> Script:
    """Lays a model's rendering of a conversation beside the anchor's.

    Inside a message the model has read the bytes that the anchor has. All that its template puts in front of a message
    is read at the column where what the anchor's template puts there is complete; where that is nothing, with the
    message's first byte.

    Args:
        anchor: the anchor's tokens.
        rendering: the anchor's rendering of the conversation.
        own_tokens: the model's tokens.
        own_rendering: the model's rendering of the same messages.
    """
    spans = anchor.spans(rendering.text)
    theirs, own = _same_contents(rendering, own_rendering)
    at = list(accumulate((len(char.encode()) for char in own.text), initial=0))  # byte of each char
    sizes = (at[place] for place in _places(_ends(spans, len(theirs.text)), theirs, own))
    marks = (Mark(at[a], at[b], token) for token, a, b in _specials(own_tokens, own))
    return Script(
        tuple(token for token, _, _ in spans), tuple(sizes), own.text.encode(), tuple(marks)
    )


def _ends(spans: Sequence[tuple[int, int, int]], length: int) -> list[int]:
    """The character up to which the text is whole behind each token: several may share one character."""
    ends, begun = [length], length
    for (_, _, stop), (_, start, _) in zip(spans[-2::-1], spans[:0:-1], strict=True):
        begun = min(begun, start)
        ends.append(min(stop, begun))
    return ends[::-1]


def _same_contents(one: Rendering, other: Rendering) -> tuple[Rendering, Rendering]:
    """Leaves the white space around a message to the templates where one of them strips it and the other does not."""
    spans: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for pair in zip(one.contents, other.contents, strict=True):
        texts = [each.text[a:b] for each, (a, b) in zip((one, other), pair, strict=True)]
        for kept, text, (start, stop) in zip(spans, texts, pair, strict=True):
            if texts[0] != texts[1]:
                start += len(text) - len(text.lstrip()) if text.strip() else 0
                stop = start + len(text.strip())
            kept.append((start, stop))
    return Rendering(one.text, tuple(spans[0])), Rendering(other.text, tuple(spans[1]))


def _places(ends: Iterable[int], anchor: Rendering, own: Rendering) -> Iterator[int]:
    """Maps places in the anchor's rendering, rising, to how much of the other one is read there."""
    theirs, ours = (
        [*each.contents, (len(each.text), len(each.text))] for each in (anchor, own)
    )  # behind the last message comes the answer
    fronts = [
        start - before
        for (start, _), before in zip(theirs, [0, *(stop for _, stop in theirs)], strict=False)
    ]  # characters of the anchor's template in front of each message
    index = -1
    for end in ends:
        while index + 1 < len(theirs) and end >= theirs[index + 1][0] + (not fronts[index + 1]):
            index += 1
        if index < 0:
            yield 0
        else:
            start, stop = theirs[index]
            yield ours[index][0] + min(end, stop) - start


def _specials(tokens: TokenBytes, own: Rendering) -> Iterator[tuple[int, int, int]]:
    """The special tokens that the template spells, cut to it: white space that they swallow may be a message's."""
    stops = [stop for _, stop in own.contents]
    bounds = [0, *chain.from_iterable(own.contents), len(own.text)]
    for token, start, stop in tokens.spans(own.text):
        spelled = own.text[start:stop].strip()
        if tokens.pieces.get(token, b"") or spelled != tokens.tokenizer.convert_ids_to_tokens(
            token
        ):
            continue
        at = own.text.index(spelled, start)
        first, last = bounds[2 * bisect_right(stops, at) :][:2]
        if first <= at and at + len(spelled) <= last:
            yield token, max(start, first), min(stop, last)
