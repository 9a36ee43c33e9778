"""Functions that a model may call: how they are told, how calls are written, guided and read back.

A call is written as `<tool_call>{"name": ..., "arguments": ...}</tool_call>` (Nous Research's Hermes convention, which
Qwen and others use). A chat template that knows tools shows them in its own way; for any other, the system message
tells of them in these words.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, nearest
from .guides import COMPACT, Guide, quoted

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
BARE = re.compile(r'\[?\s*(\{\s*("(n(a(m(e("(.*)?)?)?)?)?)?)?)?$', re.DOTALL)
"""The beginning of calls as bare JSON: an object whose first key is its name, or a list of such."""
MOST_CALLS = 8
"""In one answer, where several are allowed."""

TOLD = """\
You may call these functions. Each line is one, as JSON:
{tools}
To call one, answer with nothing but its name and arguments between these tags:
{open}
{{"name": "NAME", "arguments": {{}}}}
{close}"""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Args:
        name: of up to 64 letters, digits, dots, dashes and underscores.
        description: what it does.
        parameters: JSON schema of an object.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"}, hash=False)

    @classmethod
    def of(cls, given: Any) -> Tool:
        """Reads OpenAI's form, `{"type": "function", "function": {...}}`.

        Raises:
            InputError: it has another form.
        """
        if isinstance(given, Tool):
            return given
        function = given.get("function") if isinstance(given, Mapping) else None
        if not isinstance(function, Mapping) or given.get("type", "function") != "function":
            raise InputError(
                f'a tool is {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}, got {given!r:.200}'
            )
        name, parameters = function.get("name"), function.get("parameters") or {}
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(
                f"a tool's name has 1 to 64 letters, digits, dots, dashes or underscores, got {name!r}"
            )
        if not isinstance(parameters, Mapping):
            raise InputError(
                f"the parameters of tool {name!r} are a JSON schema, got {parameters!r:.80}"
            )
        told = {"type": "object", "properties": {}, **parameters}
        return cls(name, str(function.get("description") or ""), told)

    def to_dict(self) -> dict[str, Any]:
        """Returns OpenAI's form."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": dict(self.parameters),
            },
        }


@dataclass(frozen=True)
class ToolCall:
    """One call that a model makes.

    Attributes:
        name: of the tool.
        arguments: by name; None where what the model wrote is no JSON object.
        text: the arguments as they were written.
        id: of this call.
    """

    name: str
    arguments: dict[str, Any] | None
    text: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}", compare=False)


def read_tools(given: Sequence[Any] | None) -> list[Tool]:
    """Reads a list of tools.

    Raises:
        InputError: one of another form.
    """
    if given is not None and (isinstance(given, (str, Mapping)) or not isinstance(given, Sequence)):
        raise InputError(f"tools are a list, got {type(given).__name__}")
    return [Tool.of(one) for one in given or ()]


def check_names(tools: Sequence[Tool]) -> None:
    """Raises `InputError` where two tools have one name."""
    names = [one.name for one in tools]
    if len(set(names)) < len(names):
        raise InputError(f"each tool needs a name of its own, got {', '.join(names)}")


def read_choice(choice: Any, tools: Sequence[Tool]) -> str:
    """Reads a `tool_choice`: returns "auto", "none", "required" or "=NAME".

    Args:
        choice: None, one of the words (also "any"), a tool's name, a bool, or `{"type": "function", "function":
            {"name": ...}}`.

    Raises:
        InputError: something else, or a tool that is not there.
    """
    if choice is None or choice is False:
        return "auto" if tools and choice is None else "none"
    if choice is True:
        choice = "required"
    if isinstance(choice, Mapping):
        function = choice.get("function")
        choice = (function if isinstance(function, Mapping) else choice).get("name", choice)
    names = [one.name for one in tools]
    word = {"any": "required"}.get(choice, choice) if isinstance(choice, str) else None
    if word in ("auto", "none"):
        return word if tools else "none"
    if word == "required":
        if not tools:
            raise InputError(f"tool_choice is {choice!r} and there are no tools")
        return "required"
    if word not in names:
        expected = "auto, none, required, or the name of a tool"
        raise InputError(f"tool_choice is {expected}; got {choice!r}; {nearest(str(word), names)}")
    return f"={word}"


def check_tools(given: Sequence[Any] | None, choice: Any = None) -> None:
    """Raises `InputError` where tools or a `tool_choice` cannot be used; see `GenerationService.converse`."""
    read_choice(choice, read_tools(given))


def closed(schema: Any) -> Any:
    """Returns a JSON schema whose objects have the properties that they list and, where nothing is said, no others."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {key: _closed_under(key, value) for key, value in schema.items()}
    kinds = schema.get("type", "object")
    listed = isinstance(schema.get("properties"), Mapping)
    if listed and "object" in ([kinds] if isinstance(kinds, str) else kinds):
        return {"additionalProperties": False, **found}
    return found


def _closed_under(key: str, value: Any) -> Any:
    """What stands under a key of a schema: schemas by name, plain values, or schemas."""
    if key in ("properties", "$defs", "definitions", "patternProperties"):
        if isinstance(value, Mapping):
            return {name: closed(one) for name, one in value.items()}
        return value
    return value if key in ("enum", "const", "default", "examples", "required") else closed(value)


def knows_tools(tokenizer: Any) -> bool:
    """Whether the chat template of a tokenizer shows tools itself."""
    template = getattr(tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    return any(re.search(r"\btools\b", text) for text in texts)


def tell(tools: Sequence[Tool]) -> str:
    """Returns what a system message says of the tools."""
    lines = "\n".join(json.dumps(one.to_dict()["function"]) for one in tools)
    return TOLD.format(tools=lines, open=OPEN, close=CLOSE)


def write_call(name: str, arguments: Any) -> str:
    """Returns a call as a model writes it."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": {written}}}\n{CLOSE}'


def guide(
    tools: Sequence[Tool], choice: str, *, several: bool, schema: Mapping[str, Any] | None = None
) -> Guide | None:
    """Returns the grammar of an answer that may (auto) or must call; None where no call is wanted.

    Args:
        choice: as `read_choice` returns it.
        several: up to `MOST_CALLS` calls instead of one.
        schema: what an answer that calls nothing is JSON of (auto); None for any text, also before a call.
    """
    if choice == "none":
        return None
    named = [one for one in tools if choice in ("auto", "required", f"={one.name}")]
    more = f'("\\n" {quoted(OPEN)} call){{0,{MOST_CALLS - 1}}}' if several else ""
    rules = [f"rest: call {more}"]
    if choice != "auto":
        rules.append(f"start: {quoted(OPEN)} rest")
    elif schema is not None:
        rules += [f"start: answer | {quoted(OPEN)} rest", f"answer: %json {_compact(schema)}"]
    else:
        rules += ["start: TEXT | before rest", "TEXT: /(.|\\n)*/"]
        rules.append(f"before[lazy]: /(.|\\n)*{OPEN}/")
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(named))))
    for number, one in enumerate(named):
        head = f'\n{{"name": {json.dumps(one.name)}, "arguments": '
        tail = f"}}\n{CLOSE}"
        rules.append(f"call_{number}: {quoted(head)} arguments_{number} {quoted(tail)}")
        rules.append(f"arguments_{number}: %json {_compact(closed(one.parameters))}")
    return Guide.lark("%llguidance {}\n" + "\n".join(rules))


def _compact(schema: Any) -> str:
    """A schema as a rule takes it."""
    return json.dumps({**schema, "x-guidance": COMPACT})


def read_call(text: str) -> ToolCall | None:
    """Reads what stands between the tags; None where not even a name can be read."""
    try:
        found = json.loads(text)
    except ValueError:
        name = re.search(r'"name"\s*:\s*"([^"]+)"', text)
        written = re.search(r'"(?:arguments|parameters)"\s*:\s*(.*)', text, re.DOTALL)
        return ToolCall(name[1], None, written[1].strip() if written else "") if name else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        return ToolCall(found["name"], _object(arguments), arguments)
    if not isinstance(arguments, dict):
        return ToolCall(found["name"], None, json.dumps(arguments))
    return ToolCall(found["name"], arguments, json.dumps(arguments, ensure_ascii=False))


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class CallReader:
    """Takes an answer piece by piece; gives its text and its calls apart.

    Calls stand between tags, or, as some models write them, are the whole answer as JSON.

    Args:
        names: of the tools that are there; JSON that names another one is text.
        formed: an answer is either calls between tags, from its beginning, or text in which nothing is a call.
    """

    def __init__(self, names: Collection[str], *, formed: bool = False) -> None:
        self._names = frozenset(names)
        self._held, self._inside, self._bare = "", False, not formed
        self._undecided, self._plain = formed, False

    def push(self, text: str) -> list[str | ToolCall]:
        """Takes more of the answer; returns what is known now."""
        self._held += text
        found: list[str | ToolCall] = []
        while step := self._step():
            found += [one for one in step if one != ""]
        return found

    def finish(self) -> list[str | ToolCall]:
        """Returns what was held back, once the answer has ended."""
        held, self._held = self._held, ""
        if self._inside:
            call = read_call(held)
            return [call] if call is not None else [OPEN + held]
        calls = _bare_calls(held) if self._bare else []
        if calls and all(call.name in self._names for call in calls):
            return list(calls)
        return [held] if held else []

    def _step(self) -> list[str | ToolCall]:
        """One more piece; nothing where more of the answer is needed."""
        if self._undecided:
            if len(self._held) < len(OPEN) and OPEN.startswith(self._held):
                return []
            self._undecided, self._plain = False, not self._held.startswith(OPEN)
        if self._plain:
            held, self._held = self._held, ""
            return [held] if held else []
        if self._inside:
            inside, close, rest = self._held.partition(CLOSE)
            if not close:
                return []
            self._held, self._inside = rest.removeprefix("\n"), False
            call = read_call(inside)
            return [call if call is not None else OPEN + inside + close]
        before, opened, rest = self._held.partition(OPEN)
        if opened:
            self._held, self._inside, self._bare = rest, True, False
            return [before.rstrip("\n")]
        start = self._held.lstrip()
        if self._bare and (not start or BARE.match(start)):
            return []
        self._bare = False
        opening = (n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n]))
        settled = self._held[: len(self._held) - next(opening, 0)].rstrip("\n")
        self._held = self._held[len(settled) :]
        return [settled] if settled else []


def _bare_calls(text: str) -> list[ToolCall]:
    """Calls of an answer that is nothing but their JSON."""
    try:
        found = json.loads(text)
    except ValueError:
        return []
    items = found if isinstance(found, list) else [found]
    calls = [
        read_call(json.dumps(one))
        for one in items
        if isinstance(one, dict) and ("arguments" in one or "parameters" in one)
    ]
    known = [one for one in calls if one is not None]
    return known if len(known) == len(items) else []
