"""From text and chats to the anchor's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..alignment import Chat
from ..alignment.renderings import Message
from ..errors import InputError
from ..modeling import CoupledForCausalLM, chats


@dataclass(frozen=True)
class Prompt:
    """A prompt in the anchor's tokens.

    Attributes:
        token_ids: at least one.
        continues: whether the answer goes on in the middle of a text (then its first space counts), or is a turn.
        chat: how models with templates of their own read it, where it is a chat.
        sources: what encoders are shown beside it, by name: inputs of one row. Prompts are equal whose tokens and chat
            are, whatever they show.
    """

    token_ids: tuple[int, ...]
    continues: bool = False
    chat: Chat | None = None
    sources: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InputError("the prompt is empty; pass at least one token")


PromptLike = Prompt | str | Sequence[Message]
"""A rendered prompt, plain text to go on from, or the messages of a chat."""


def check_text(text: str) -> None:
    """Raises `InputError` where a text is no Unicode text, as half a surrogate pair is not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a text holds half a character at {error.start}: {error.reason}"
        ) from error


def encode(tokenizer: Any, text: str) -> Prompt:
    """Turns plain text into a prompt to go on from.

    Raises:
        InputError: the text is empty or no string.
    """
    if not isinstance(text, str) or not text:
        raise InputError(f"a prompt is a text of at least one character, got {text!r:.60}")
    check_text(text)
    return Prompt(tuple(tokenizer(text)["input_ids"]), continues=True)


def render(model: CoupledForCausalLM, messages: Sequence[Message], **template: Any) -> Prompt:
    """Renders a chat with the anchor's template, up to where the assistant's turn begins.

    Args:
        messages: dicts with a `role` and a `content`, both strings.
        template: more variables for the templates.

    Raises:
        InputError: no messages, malformed ones, no template, or messages that the template refuses.
    """
    for one in messages if isinstance(messages, Sequence) else ():
        if isinstance(one, Mapping) and isinstance(one.get("content"), str):
            check_text(one["content"])
    token_ids, chat = chats.read(model, messages, template)
    return Prompt(tuple(token_ids), chat=chat)
