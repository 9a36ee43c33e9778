"""A conversation as a chat template renders it, and where its messages lie in that text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import InputError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        text: up to where the assistant's next turn begins.
        contents: the characters at which each message's content starts and stops.
    """

    text: str
    contents: tuple[tuple[int, int], ...]


def render(tokenizer: Any, messages: Sequence[Message], template: Mapping[str, Any]) -> str:
    """Renders messages by a tokenizer's chat template.

    Args:
        template: more variables for the template.

    Raises:
        InputError: the template refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            **template,
        )
    except (TemplateError, ValueError) as error:
        raise InputError(f"chat template refuses these messages: {error}") from error
    return text


def locate(tokenizer: Any, messages: Sequence[Message], template: Mapping[str, Any]) -> Rendering:
    """Renders messages and finds their contents, as they are or stripped of white space around them.

    What lies between them is known from a second rendering, of placeholders: it is the same whatever the messages say.

    Raises:
        InputError: the template refuses the messages, or changes, leaves out, repeats or moves a content.
    """
    text = render(tokenizer, messages, template)
    places = [f"\ue000{number}\ue001" for number in range(len(messages))]
    held = [{**one, "content": place} for one, place in zip(messages, places, strict=True)]
    pieces = _between(render(tokenizer, held, template), places)
    contents, at = [], len(pieces[0])
    if not text.startswith(pieces[0]):
        raise InputError("chat template depends on what the messages say")
    for number, (message, piece) in enumerate(zip(messages, pieces[1:], strict=True), 1):
        for content in (message["content"], message["content"].strip()):
            if text.startswith(content + piece, at):
                break
        else:
            raise InputError(
                f"chat template changes message {number} of {len(messages)}, or depends on what it says"
            )
        contents.append((at, at + len(content)))
        at += len(content + piece)
    if at != len(text):
        raise InputError("chat template depends on what the messages say")
    return Rendering(text, tuple(contents))


def _between(text: str, places: Sequence[str]) -> list[str]:
    """The template's own text before, between and behind the placeholders."""
    starts = [text.find(place) for place in places]
    for number, (start, place) in enumerate(zip(starts, places, strict=True), 1):
        if text.count(place) != 1:
            how = "changes or leaves out" if start < 0 else "repeats"
            raise InputError(f"chat template {how} message {number} of {len(places)}")
    if starts != sorted(starts):
        raise InputError("chat template changes the messages' order")
    stops = [start + len(place) for start, place in zip(starts, places, strict=True)]
    bounds = [0, *(bound for pair in zip(starts, stops, strict=True) for bound in pair), len(text)]
    return [text[a:b] for a, b in list(pairwise(bounds))[::2]]
