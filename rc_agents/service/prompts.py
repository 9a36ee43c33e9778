"""From text and chats to the anchor's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A prompt in the anchor's tokens.

    Attributes:
        token_ids: at least one.
        continues: whether the answer goes on in the middle of a text (then its first space counts), or is a turn.
    """

    token_ids: tuple[int, ...]
    continues: bool = False

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InputError("the prompt is empty; pass at least one token")


PromptLike = Prompt | str | Sequence[Message]
"""A rendered prompt, plain text to go on from, or the messages of a chat."""


def encode(tokenizer: Any, text: str) -> Prompt:
    """Turns plain text into a prompt to go on from.

    Raises:
        InputError: the text is empty or no string.
    """
    if not isinstance(text, str) or not text:
        raise InputError(f"a prompt is a text of at least one character, got {text!r:.60}")
    return Prompt(tuple(tokenizer(text)["input_ids"]), continues=True)


def render(tokenizer: Any, messages: Sequence[Message], **template: Any) -> Prompt:
    """Renders a chat with the tokenizer's template, up to where the assistant's turn begins.

    Args:
        messages: dicts with a `role` and a `content`, both strings.
        template: more variables for the template.

    Raises:
        InputError: no messages, malformed ones, no template, or messages that the template refuses.
    """
    from jinja2 import TemplateError

    _check(messages)
    if not tokenizer.chat_template:
        raise InputError(
            "the anchor's tokenizer has no chat template; pass plain text, or set model.tokenizer.chat_template"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            **template,
        )
    except TemplateError as error:
        raise InputError(f"the anchor's chat template refuses these messages: {error}") from error
    return Prompt(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _check(messages: Any) -> None:
    if not isinstance(messages, Sequence) or not messages:
        raise InputError(f"a chat is a list of at least one message, got {messages!r:.60}")
    for message in messages:
        parts = (
            [message.get(key) for key in ("role", "content")]
            if isinstance(message, Mapping)
            else [None]
        )
        if not all(isinstance(part, str) for part in parts):
            raise InputError(
                f"a message is a dict with a role and a content, both strings, got {message!r:.120}"
            )
