"""Microsoft's Agent Framework: a chat client over an ensemble.

agent = Agent(EnsembleChatClient("my-ensemble", specialists=["medical"]), instructions="Be brief.", tools=[...])
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_framework import (
    BaseChatClient,
    ChatMiddlewareLayer,
    ChatResponse,
    ChatResponseUpdate,
    Content,
    FunctionInvocationLayer,
    FunctionTool,
    Message,
    prepend_instructions_to_messages,
)
from agent_framework.observability import ChatTelemetryLayer

from rc_agents import CoupledForCausalLM
from rc_agents.errors import InputError
from rc_agents.service import (
    Conversation,
    GenerationParams,
    GenerationResult,
    GenerationService,
    settings_over,
    unblocked,
)

FORMS = ("tools", "tool_choice", "allow_multiple_tool_calls", "response_format", "instructions")
PENALTIES = ("frequency_penalty", "presence_penalty")
IGNORED = ("model", "metadata", "user", "store")
"""Options of the framework that have no meaning here; what is neither these nor ours is refused."""
UNREAD = ("text_reasoning", "usage")
"""Contents of earlier answers that are not said again."""
READ = "this adapter takes text, pictures and sounds as data"


class EnsembleChatClient(
    FunctionInvocationLayer, ChatMiddlewareLayer, ChatTelemetryLayer, BaseChatClient
):
    """An ensemble as a chat client of Agent Framework, which calls tools itself; answers run in threads of their own.

    Args:
        model: a live ensemble, a service over one, or its folder, id or `package:NAME`.
        middleware: of the framework.
        options: `max_tokens` and what `GenerationParams` takes, for every call; each call may pass its own.
    """

    OTEL_PROVIDER_NAME = "rc_agents"

    def __init__(
        self,
        model: CoupledForCausalLM | GenerationService | str | Path,
        *,
        middleware: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(middleware=middleware)
        GenerationParams.of(options, others=())
        self.service, self.options = GenerationService.of(model), options
        self.model = self.service.model.name_or_path or "rc_agents"

    def _inner_get_response(
        self, *, messages: Sequence[Message], stream: bool, options: Mapping[str, Any], **_: Any
    ) -> Any:
        if stream:
            form = options.get("response_format")
            return self._build_response_stream(
                self._updates(messages, options), response_format=form
            )
        return self._whole(messages, options)

    async def _whole(self, messages: Sequence[Message], options: Mapping[str, Any]) -> ChatResponse:
        talk, params = await self._plan(messages, options)
        result = await asyncio.to_thread(self.service.generate, talk.prompt, params)
        contents = [_content(piece) for piece in talk.pieces([result.text])]
        calls = any(one.type == "function_call" for one in contents)
        return ChatResponse(
            messages=Message("assistant", contents),
            model=self.model,
            finish_reason=_reason(result, calls),
            usage_details=_usage(result),
            response_format=options.get("response_format"),
            raw_representation=result,
        )

    async def _updates(
        self, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> AsyncIterator[ChatResponseUpdate]:
        talk, params = await self._plan(messages, options)
        calls = False
        async with self.service.stream(talk.prompt, params) as stream:
            async for piece in unblocked(talk.pieces(stream)):
                content = _content(piece)
                calls = calls or content.type == "function_call"
                yield ChatResponseUpdate(contents=[content], role="assistant", model=self.model)
            result = stream.result
        yield ChatResponseUpdate(
            contents=[Content.from_usage(_usage(result))],
            role="assistant",
            model=self.model,
            finish_reason=_reason(result, calls),
        )

    async def _plan(
        self, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> tuple[Conversation, GenerationParams]:
        asked = await self._validate_options(settings_over(self.options, options))
        said = {name: one for name, one in asked.items() if name not in PENALTIES or one}
        params = GenerationParams.of(said, others=(*FORMS, *IGNORED))
        tools, choice = _tools(asked.get("tools"), asked.get("tool_choice"))
        told = prepend_instructions_to_messages(list(messages), asked.get("instructions"))
        talk = await asyncio.to_thread(
            self.service.converse,
            [turn for message in told for turn in _turns(message)],
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=bool(asked.get("allow_multiple_tool_calls")),
            response_format=_form(asked.get("response_format")),
        )
        return talk, talk.params(params)


def _content(piece: Any) -> Content:
    if isinstance(piece, str):
        return Content.from_text(piece)
    return Content.from_function_call(piece.id, piece.name, arguments=piece.text)


def _turns(message: Message) -> Iterator[dict[str, Any]]:
    """A message in OpenAI's form; each result of a call is one of its own."""
    parts: list[Any] = []
    calls = []
    for one in message.contents:
        if one.type in ("text", "data", "uri"):
            parts.append(_part(one))
        elif one.type == "function_call":
            calls.append(
                {"id": one.call_id, "function": {"name": one.name, "arguments": one.arguments}}
            )
        elif one.type == "function_result":
            yield {"role": "tool", "tool_call_id": one.call_id, "content": _told(one)}
        elif one.type not in UNREAD:
            raise InputError(f"{READ}, got a content of type {one.type!r}")
    if parts or calls:
        shown = any(isinstance(one, Mapping) for one in parts)
        turn = {"role": str(message.role), "content": parts if shown else "".join(parts)}
        yield {**turn, "tool_calls": calls} if calls else turn


def _told(result: Content) -> str | list[Any]:
    """What a call gave: its text, with the pictures and sounds beside it."""
    items = [one for one in result.items or () if one.type != "text"]
    text = str(result.result or "")
    return [text, *map(_part, items)] if items else text


def _part(content: Content) -> str | dict[str, Any]:
    """Part of a message in OpenAI's form: a text, or what a data URL holds."""
    if content.type == "text":
        return content.text or ""
    kind = (content.media_type or "").partition("/")[0]
    if kind == "image":
        return {"type": "image_url", "image_url": {"url": content.uri}}
    if kind == "audio" and content.type == "data":
        sound = {"data": (content.uri or "").partition(",")[2], "format": "wav"}
        return {"type": "input_audio", "input_audio": sound}
    raise InputError(
        f"{READ}, got {content.type} of the media type {content.media_type!r}; give a file's bytes by Content.from_data"
    )


def _tools(given: Any, choice: Any) -> tuple[list[Any] | None, str | None]:
    tools = [
        one.to_json_schema_spec() if isinstance(one, FunctionTool) else one for one in given or ()
    ]
    if isinstance(choice, Mapping):
        allowed = choice.get("allowed_tools")
        if allowed is not None:
            tools = [one for one in tools if one["function"]["name"] in allowed]
        choice = choice.get("required_function_name") or choice["mode"]
    return tools or None, choice


def _form(given: Any) -> Any:
    """OpenAI's `response_format`, also from a schema alone; a pydantic class as it is."""
    schema = isinstance(given, Mapping) and "json_schema" not in given
    if not schema or given.get("type") in ("text", "json_object"):
        return given
    return {"type": "json_schema", "json_schema": given}


def _reason(result: GenerationResult, calls: bool) -> str:
    reason = "length" if result.finish_reason == "timeout" else result.finish_reason
    return "tool_calls" if calls and reason == "stop" else reason


def _usage(result: GenerationResult) -> Any:
    tokens = result.prompt_tokens, result.completion_tokens
    return {
        "input_token_count": tokens[0],
        "output_token_count": tokens[1],
        "total_token_count": sum(tokens),
    }
