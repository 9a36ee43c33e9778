"""Conversations to prompts and answers, by a tokenizer's chat template."""

from collections.abc import Iterator, Sequence
from typing import Any

from rc_agents.errors import DataError
from rc_agents.training.data.records import Conversation, Message, Pair


def turns(tokenizer: Any, conversation: Conversation, *, every: bool) -> Iterator[Pair]:
    """Yields assistant turns, each as it is when the model generates it: what came before, and the answer.

    The prompt is the template's rendering up to where the assistant begins. The completion is what the
    template puts there, with its end-of-turn token, so that a model learns to stop as the template stops.
    Each turn is rendered by itself, for templates show a turn otherwise once others follow it (they drop
    its reasoning, for instance).

    Args:
        tokenizer: with a chat template.
        conversation: messages with at least one assistant turn; those after the last are not used.
        every: learn every assistant turn, not the last alone.

    Raises:
        DataError: there is no template, it refuses the messages, or does not put an answer behind the prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "messages need the tokenizer's chat template, and it has none: "
            "set tokenizer.chat_template, or give prompt and completion"
        )
    messages = conversation.messages
    places = [n for n, message in enumerate(messages) if message.role == "assistant" and n]
    if not places:
        raise DataError(f"nothing stands before the answer {messages[-1].content[:40]!r}")
    for place in places if every else places[-1:]:
        prompt = _rendered(tokenizer, messages[:place], add_generation_prompt=True)
        text = _rendered(tokenizer, messages[: place + 1])
        answer = text.removeprefix(prompt).rstrip()
        if not text.startswith(prompt) or not answer:
            raise DataError(
                "the chat template does not render an answer behind its own generation prompt, as with "
                f"{messages[place].content[:40]!r}: give prompt and completion instead of messages"
            )
        yield Pair(prompt, answer, conversation.group)


def _rendered(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [message._asdict() for message in messages], tokenize=False, **options
        )
    except (TemplateError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the chat template refuses messages: {reason}") from error
