"""Fields of data put into words: `Question: {question}\\nAnswer:`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from rc_agents.errors import DataError, nearest
from rc_agents.training.data.records import Conversation, Document, Message, Pair, Record


@dataclass(frozen=True, kw_only=True)
class Template:
    r"""How a row of data is put into a prompt and what should follow it.

    For example `Template(prompt="Question: {question}\nAnswer:", completion=" {answer}", group="plain")`.

    Args:
        prompt: text with `{field}` for what stands in the row; `{{` and `}}` for braces.
        completion: the same; without it the prompt is a document.
        group: of the pairs it makes; by default that of `Pair`, or of `Conversation` where `chat`.
        chat: make a conversation, the prompt what the user says and the completion the answer.

    Raises:
        DataError: a text that is no format of plain fields, or has no field.
    """

    prompt: str
    completion: str | None = None
    group: str = ""
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and self.completion is None:
            raise DataError("a chat template needs a completion, which is the assistant's answer")
        if not self.fields:
            raise DataError(f"template {self.prompt!r} names no field, such as {{question}}")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a row that it reads: first those of the prompt."""
        return tuple(dict.fromkeys(_fields(self.prompt) + _fields(self.completion or "")))


def apply(templates: Sequence[Template], row: Any, where: str) -> list[Record]:
    """Returns one record a template, all of one origin: what the first prompt reads from the row.

    Args:
        templates: at least one.
        row: a mapping of fields to texts or numbers.
        where: what to call the row in an error.

    Raises:
        DataError: the row is no mapping, or a field is missing, empty or not text.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where} has no fields for a template: it is {type(row).__name__}")
    origin = "\n".join(_value(row, name, where) for name in _fields(templates[0].prompt))
    return [_fill(template, row, where, origin) for template in templates]


def _fill(template: Template, row: Mapping[str, Any], where: str, origin: str) -> Record:
    values = {name: _value(row, name, where) for name in template.fields}
    prompt = template.prompt.format_map(values)
    if template.completion is None:
        return Document(prompt, origin)
    completion = template.completion.format_map(values)
    if not template.chat:
        return Pair(prompt, completion, template.group, origin)
    messages = (Message("user", prompt), Message("assistant", completion))
    return Conversation(messages, template.group or "chat", origin)


def _fields(text: str) -> list[str]:
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise DataError(
            f"template {text!r}: {error}; write {{{{ and }}}} for braces as such"
        ) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion or set(".[") & set(name)):
            raise DataError(f"template {text!r} needs plain fields such as {{question}}")
    return [name for _, name, _, _ in parts if name]


def _value(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise DataError(f"{where} has no field {name!r}; {nearest(name, map(str, row))}")
    value = row[name]
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(f"field {name!r} of {where} needs text, not {value!r:.60}")
    return str(value)
