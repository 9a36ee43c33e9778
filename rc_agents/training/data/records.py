"""What there is to learn: documents, pairs and conversations, and how a line of data names them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rc_agents.errors import DataError

PAIR_FIELDS = (("prompt", "completion"), ("question", "answer"))
FIELDS = ("text", *(field for pair in PAIR_FIELDS for field in pair), "messages", "group", "ends")


@dataclass(frozen=True)
class Document:
    """A text to be learnt as it is.

    Records of one `origin`, such as a fact put in several ways, always fall into the same part of a split.
    """

    text: str
    origin: str = ""

    @property
    def key(self) -> str:
        """What tells it from other documents."""
        return self.origin or self.text


@dataclass(frozen=True)
class Pair:
    """A prompt and what should follow it.

    Batches are made of pairs of one `group`, such as one prompt template; `text` is the group that
    documents have. `origin` is that of `Document`. With `ends=False` the completion was cut off, and no
    end of text is learnt behind it. `sources` is what encoders are shown beside it, such as
    `{"eye": {"pixel_values": ...}}` with one row; pairs that differ in that alone want an `origin` each.
    """

    prompt: str
    completion: str
    group: str = ""
    origin: str = ""
    ends: bool = True
    sources: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """What tells it from other pairs: two answers to one prompt count as the same."""
        return self.origin or self.prompt


class Message(NamedTuple):
    """One turn of a conversation; its role is `system`, `user` or `assistant` in most chat templates."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages whose assistant turns are to be learnt, rendered by the tokenizer's chat template.

    `group` and `origin` are those of `Pair`.
    """

    messages: tuple[Message, ...]
    group: str = "chat"
    origin: str = ""

    @property
    def key(self) -> str:
        """What tells it from others: what the user says first, whatever is answered."""
        return self.origin or "\n".join(self._opening() or (m.content for m in self.messages))

    def _opening(self) -> list[str]:
        turns = [message for message in self.messages if message.role != "system"]
        roles = [message.role for message in turns]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        return [message.content for message in turns[:first]]


Record = Document | Pair | Conversation


def record(item: Any, where: str) -> Record:
    """Returns what an object of data stands for.

    Args:
        item: a record, a text, or a mapping with the fields of one.
        where: what to call it in an error.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(item, Document | Pair | Conversation):
        return item
    if isinstance(item, str):
        item = {"text": item}
    if isinstance(item, Mapping):
        if _filled(item, "text"):
            return Document(item["text"])
        for prompt, completion in PAIR_FIELDS:
            if _filled(item, prompt, completion):
                ends = item.get("ends", True)
                if not isinstance(ends, bool):
                    raise DataError(f"{where} has ends={ends!r}, which is true or false")
                return Pair(item[prompt], item[completion], str(item.get("group") or ""), ends=ends)
        if item.get("messages") is not None:
            messages = _messages(item["messages"], where)
            return Conversation(messages, str(item.get("group") or "chat"))
    found = f"keys {sorted(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
    raise DataError(
        f"{where} needs a non-empty text, prompt and completion, question and answer, or messages, not {found}"
    )


def _filled(item: Mapping[str, Any], *fields: str) -> bool:
    return all(isinstance(item.get(field), str) and item[field].strip() for field in fields)


def _messages(found: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(found, list | tuple):
        raise DataError(f"{where} has messages that are no list but {type(found).__name__}")
    for number, message in enumerate(found, start=1):
        if not (isinstance(message, Mapping) and _filled(message, "role", "content")):
            raise DataError(
                f"message {number} of {where} needs a role and a content, both non-empty text, not {message!r:.60}"
            )
    messages = tuple(Message(message["role"], message["content"]) for message in found)
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{where} has no message of the role 'assistant', so nothing to learn")
    return messages
