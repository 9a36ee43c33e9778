"""From a chat with tools and a wanted form to a prompt, and from the answer back to text and calls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..alignment.renderings import Message
from ..errors import InputError
from ..modeling import CoupledForCausalLM
from . import prompts, tools
from .guides import Guide
from .params import GenerationParams
from .prompts import Prompt
from .tools import CallReader, ToolCall

FORMS = ("text", "json_object", "json_schema")


@dataclass(frozen=True)
class Reply:
    """An answer, read.

    Attributes:
        content: its text without calls.
        tool_calls: in the order in which they were written.
    """

    content: str
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A chat, ready to be answered.

    Attributes:
        prompt: rendered.
        guide: the form that the answer keeps to, or None.
        tools: names of those that the answer may call.
        formed: whether an answer that calls nothing has a form of its own, and is never read as a call.
    """

    prompt: Prompt
    guide: Guide | None = None
    tools: tuple[str, ...] = ()
    formed: bool = False

    def params(self, params: GenerationParams) -> GenerationParams:
        """Returns parameters with the answer's form."""
        return params if self.guide is None else replace(params, guide=self.guide)

    def read(self, text: str) -> Reply:
        """Splits a whole answer into text and calls."""
        found = list(self.pieces([text]))
        content = "".join(one for one in found if isinstance(one, str))
        return Reply(content, tuple(one for one in found if isinstance(one, ToolCall)))

    def reader(self) -> CallReader | None:
        """Returns what splits an answer into text and calls while it comes; None where it is text alone."""
        return CallReader(self.tools, formed=self.formed) if self.tools else None

    def pieces(self, texts: Iterable[str]) -> Iterator[str | ToolCall]:
        """Splits an answer into text and calls while it comes."""
        reader = self.reader()
        if reader is None:
            yield from texts
            return
        for text in texts:
            yield from reader.push(text)
        yield from reader.finish()


def converse(
    model: CoupledForCausalLM,
    messages: Sequence[Message],
    *,
    functions: Sequence[Any] | None = None,
    tool_choice: Any = None,
    parallel_tool_calls: bool = False,
    response_format: Mapping[str, Any] | None = None,
    template: Mapping[str, Any] | None = None,
) -> Conversation:
    """Plans the answer to a chat; see `GenerationService.converse`."""
    given = tools.read_tools(functions)
    tools.check_names(given)
    choice = tools.read_choice(tool_choice, given)
    schema, note = read_format(response_format)
    if choice not in ("auto", "none"):
        schema, note = None, ""  # the answer is a call
    shown = given if choice != "none" else []
    native = bool(shown) and tools.knows_tools(model.tokenizer)
    if note and shown:
        note = f"If you call no function, {note[0].lower()}{note[1:]}"
    notes = [note, tools.tell(shown) if shown and not native else ""]
    told = told_to(written(messages, native=native), [one for one in notes if one])
    variables = dict(template or {})
    if native:
        variables["tools"] = [one.to_dict() for one in shown]
    guide = None if schema is None else Guide.json_schema(schema)
    if shown:
        guide = tools.guide(given, choice, several=parallel_tool_calls, schema=schema)
    names = tuple(one.name for one in shown)
    prompt = prompts.render(model, told, **variables)
    return Conversation(prompt, guide, names, formed=schema is not None)


def form_of(given: Any) -> Any:
    """Returns OpenAI's `response_format` of a pydantic class; anything else as it is."""
    if not (isinstance(given, type) and hasattr(given, "model_json_schema")):
        return given
    schema = {"name": given.__name__, "schema": given.model_json_schema(), "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def read_format(given: Any) -> tuple[Mapping[str, Any] | None, str]:
    """Reads OpenAI's `response_format`, or a pydantic class; returns its schema and what the system message says of it.

    Raises:
        InputError: another form.
    """
    if given is None:
        return None, ""
    given = form_of(given)
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind not in FORMS:
        raise InputError(
            f'response_format is {{"type": {" | ".join(FORMS)}}}, the last with "json_schema", got {given!r:.120}'
        )
    if kind == "text":
        return None, ""
    if kind == "json_object":
        return {"type": "object"}, "Answer with one JSON object and nothing else."
    holder = given.get("json_schema")
    schema = holder.get("schema", holder) if isinstance(holder, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InputError(
            f'response_format "json_schema" needs {{"json_schema": {{"schema": ...}}}}, got {given!r:.120}'
        )
    note = f"Answer with JSON of this schema and nothing else:\n{json.dumps(schema)}"
    strict = bool(holder.get("strict")) if isinstance(holder, Mapping) else False
    return tools.closed(schema) if strict else schema, note


def told_to(messages: Sequence[Message], notes: Sequence[str]) -> list[dict[str, Any]]:
    """Returns messages whose system message ends with the notes."""
    told = [dict(one) for one in messages]
    if not notes:
        return told
    text = "\n\n".join(notes)
    if told and told[0].get("role") == "system" and isinstance(told[0].get("content"), str):
        told[0]["content"] = f"{told[0]['content']}\n\n{text}"
        return told
    return [{"role": "system", "content": text}, *told]


def written(messages: Any, *, native: bool) -> list[dict[str, Any]]:
    """Returns messages whose calls and results are text, or in the template's form where it knows tools.

    Raises:
        InputError: a call or a result of another form than OpenAI's.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"a chat is a list of at least one message, got {messages!r:.60}")
    found: list[dict[str, Any]] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise InputError(f"a message is a dict with a role and a content, got {message!r:.120}")
        one = dict(message)
        if one.get("tool_calls"):
            found.append(_calling(one, native))
        elif one.get("role") in ("tool", "function") and not native:
            answer = f"<tool_response>\n{one.get('content') or ''}\n</tool_response>"
            found.append({"role": "user", "content": answer})
        else:
            found.append(one)
    return found if native else _joined(found)


def _calling(message: dict[str, Any], native: bool) -> dict[str, Any]:
    """A message with calls, whose arguments a template wants as a dict."""
    calls = []
    for call in message.pop("tool_calls"):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(
                f'a call is {{"id": ..., "function": {{"name": ..., "arguments": ...}}}}, got {call!r:.120}'
            )
        calls.append((call.get("id"), function["name"], function.get("arguments") or "{}"))
    content = message.get("content") or ""
    if not native:
        text = "\n".join(tools.write_call(name, arguments) for _, name, arguments in calls)
        return {**message, "content": f"{content}\n{text}".strip()}
    asked = [
        {"type": "function", "id": known, "function": {"name": name, "arguments": _dict(arguments)}}
        for known, name, arguments in calls
    ]
    return {**message, "content": content, "tool_calls": asked}


def _dict(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results that follow one another as one message, as many templates want turns to alternate."""
    found: list[dict[str, Any]] = []
    for one in messages:
        last = found[-1] if found else None
        results = str(one.get("content", "")).startswith("<tool_response>")
        if last and results and str(last.get("content", "")).startswith("<tool_response>"):
            last["content"] += "\n" + one["content"]
        else:
            found.append(one)
    return found
