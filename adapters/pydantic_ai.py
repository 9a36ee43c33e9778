"""pydantic-ai: a model over an ensemble.

agent = Agent(EnsembleModel("my-ensemble", specialists=["medical"]), output_type=Title)
"""

from __future__ import annotations

import asyncio
import pkgutil
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pydantic_ai.models
from pydantic_ai.messages import (
    BinaryContent,
    CachePoint,
    ImageUrl,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ModelResponsePart,
    ModelResponseStreamEvent,
    RetryPromptPart,
    SystemPromptPart,
    TextContent,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse
from pydantic_ai.models._tool_choice import resolve_tool_choice
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.settings import ModelSettings
from pydantic_ai.usage import RequestUsage

from rc_agents import CoupledForCausalLM
from rc_agents.errors import InputError, nearest
from rc_agents.service import (
    Conversation,
    GenerationParams,
    GenerationResult,
    GenerationService,
    TextStream,
    lines,
    unblocked,
)

PARAMS = ("temperature", "top_p", "top_k", "seed", "timeout")
IGNORED = (
    "max_retries",
    "presence_penalty",
    "frequency_penalty",
    "extra_headers",
    "extra_body",
    "citations",
    "service_tier",
)


class EnsembleSettings(ModelSettings, total=False):  # type: ignore[call-arg, unused-ignore]
    """What a run may also set, over what the model was made with.

    Attributes:
        rc_agents_specialists: who takes part.
        rc_agents_strength: factor on the bridges, or a dict by specialist.
    """

    rc_agents_specialists: Sequence[str]
    rc_agents_strength: float | Mapping[str, float]


NEUTRAL = (
    "batch",
    "concurrency",
    "decision",
    "fallback",
    "function",
    "instrumented",
    "test",
    "wrapper",
)
OTHERS = tuple(
    f"{one.name}_"
    for one in pkgutil.iter_modules(pydantic_ai.models.__path__)
    if one.name not in NEUTRAL and not one.name.startswith("_")
)
"""How settings begin that are for models of other providers, and have no meaning here."""


class EnsembleModel(Model):
    """An ensemble as a model of pydantic-ai; requests run in a thread of their own.

    Args:
        model: a live ensemble, a service over one, or its folder, id or `package:NAME`.
        specialists: who takes part; None for all.
        strength: factor on the bridges, or a dict by specialist.
        settings: of every request: `max_tokens`, `temperature`, `top_p`, `top_k`, `seed`, `timeout` in seconds,
            `stop_sequences`, `logit_bias` by token id, `tool_choice`, `parallel_tool_calls`, and what pydantic-ai sees
            to itself; `EnsembleSettings` has the ensemble's own. Those in `IGNORED` have no meaning here: pydantic-ai
            warns of `max_retries`, `extra_headers` and `extra_body`, and of the others says nothing, as they are hints
            that not every model takes.

    Raises:
        InputError: a setting that nobody knows.
    """

    unsupported_settings: ClassVar[frozenset[Any]] = frozenset(IGNORED)

    def __init__(
        self,
        model: CoupledForCausalLM | GenerationService | str | Path,
        *,
        specialists: Sequence[str] | None = None,
        strength: float | Mapping[str, float] | None = None,
        settings: EnsembleSettings | ModelSettings | None = None,
    ) -> None:
        _check(settings or {})  # before any model is loaded
        profile = ModelProfile(supports_json_schema_output=True, supports_json_object_output=True)
        super().__init__(settings=settings, profile=profile)
        self.service = GenerationService.of(model)
        self.chosen = GenerationParams(specialists=specialists, strength=strength)

    @property
    def model_name(self) -> str:
        """The ensemble's name."""
        return self.service.model.name_or_path or "rc_agents"

    @property
    def system(self) -> str:
        """Who provides it."""
        return "rc_agents"

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        """Answers a conversation."""
        settings, asked = self.prepare_request(model_settings, model_request_parameters)
        return await asyncio.to_thread(self._answer, messages, settings or {}, asked)

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: Any = None,
    ) -> AsyncGenerator[StreamedResponse]:
        """Answers a conversation piece by piece; each call comes whole. Leaving it ends the generation."""
        settings, asked = self.prepare_request(model_settings, model_request_parameters)
        talk, params = await asyncio.to_thread(self._plan, messages, settings or {}, asked)
        async with self.service.stream(talk.prompt, params) as stream:
            yield EnsembleStream(asked, talk, stream, self.model_name)

    def _answer(
        self, messages: list[ModelMessage], settings: Any, asked: ModelRequestParameters
    ) -> ModelResponse:
        talk, params = self._plan(messages, settings, asked)
        result = self.service.generate(talk.prompt, params)
        reply = talk.read(result.text)
        parts: list[ModelResponsePart] = [TextPart(reply.content)] if reply.content else []
        parts += [ToolCallPart(one.name, one.text, one.id) for one in reply.tool_calls]
        return ModelResponse(parts=parts, usage=_usage(result), model_name=self.model_name)

    def _plan(
        self, messages: list[ModelMessage], settings: Any, asked: ModelRequestParameters
    ) -> tuple[Conversation, GenerationParams]:
        _check(settings)
        choice, tools = _offered(settings, asked)
        form = None
        if asked.output_mode == "native" and asked.output_object is not None:
            schema = {"schema": asked.output_object.json_schema, "strict": True}
            form = {"type": "json_schema", "json_schema": schema}
        talk = self.service.converse(
            self._turns(messages, asked),
            tools=tools or None,
            tool_choice=choice,
            parallel_tool_calls=bool(settings.get("parallel_tool_calls")),
            response_format=form,
        )
        params = GenerationParams(
            max_new_tokens=settings.get("max_tokens"),
            stop=settings.get("stop_sequences") or (),
            logit_bias=settings.get("logit_bias"),
            specialists=settings.get("rc_agents_specialists", self.chosen.specialists),
            strength=settings.get("rc_agents_strength", self.chosen.strength),
            **{name: settings[name] for name in PARAMS if settings.get(name) is not None},
        )
        return talk, talk.params(params)

    def _turns(
        self, messages: list[ModelMessage], asked: ModelRequestParameters
    ) -> list[dict[str, Any]]:
        """The conversation in OpenAI's form."""
        found: list[dict[str, Any]] = []
        for one in self._get_instruction_parts(messages, asked) or ():
            found.append({"role": "system", "content": one.content})
        for message in messages:
            if isinstance(message, ModelRequest):
                found += [_request(part) for part in message.parts]
            else:
                found.append(_response(message))
        system = "\n\n".join(one["content"] for one in found if one["role"] == "system")
        rest = [one for one in found if one["role"] != "system"]
        return [{"role": "system", "content": system}, *rest] if system else rest


@dataclass
class EnsembleStream(StreamedResponse):
    """An answer that comes piece by piece.

    Args:
        talk: the conversation that it answers.
        stream: its text.
        name: of the ensemble.
        began: when.
    """

    talk: Conversation
    stream: TextStream[GenerationResult]
    name: str
    began: datetime = field(default_factory=lambda: datetime.now(UTC))

    async def _get_event_iterator(self) -> AsyncIterator[ModelResponseStreamEvent]:
        async for piece in unblocked(self.talk.pieces(self.stream)):
            if isinstance(piece, str):
                for event in self._parts_manager.handle_text_delta(
                    vendor_part_id=None, content=piece
                ):
                    yield event
            else:
                yield self._parts_manager.handle_tool_call_part(
                    vendor_part_id=piece.id,
                    tool_name=piece.name,
                    args=piece.text,
                    tool_call_id=piece.id,
                )
        self._usage = _usage(self.stream.result)

    async def close_stream(self) -> None:
        """Ends the generation within one token."""
        await asyncio.to_thread(self.stream.close)

    @property
    def model_name(self) -> str:
        """The ensemble's name."""
        return self.name

    @property
    def timestamp(self) -> datetime:
        """When it began."""
        return self.began

    @property
    def provider_name(self) -> str:
        """Who provides it."""
        return "rc_agents"

    @property
    def provider_url(self) -> None:
        """Nothing: it runs in this process."""
        return


def _check(settings: Mapping[str, Any]) -> None:
    known = EnsembleSettings.__annotations__
    for name in settings:
        if name not in known and not name.startswith(OTHERS):
            raise InputError(f"{name!r} is no setting; {nearest(name, sorted(known))}")


def _usage(result: GenerationResult) -> RequestUsage:
    return RequestUsage(input_tokens=result.prompt_tokens, output_tokens=result.completion_tokens)


def _request(part: Any) -> dict[str, Any]:
    if isinstance(part, SystemPromptPart):
        return {"role": "system", "content": part.content}
    if isinstance(part, UserPromptPart):
        given = [part.content] if isinstance(part.content, str) else part.content
        contents = [
            one.content if isinstance(one, TextContent) else one
            for one in given
            if not isinstance(one, CachePoint)
        ]
        if all(isinstance(one, str) for one in contents):
            return {"role": "user", "content": "\n".join(map(str, contents))}
        return {"role": "user", "content": lines([_part(one) for one in contents])}
    if isinstance(part, ToolReturnPart):
        text: Any = part.model_response_str()
        if part.files:
            text = [{"type": "text", "text": text}, *map(_part, part.files)]
        return {"role": "tool", "tool_call_id": part.tool_call_id, "content": text}
    if isinstance(part, RetryPromptPart):
        role = "user" if part.tool_name is None else "tool"
        return {"role": role, "tool_call_id": part.tool_call_id, "content": part.model_response()}
    raise InputError(f"this adapter takes text, pictures and sounds, got a {type(part).__name__}")


def _part(content: Any) -> dict[str, Any]:
    """Part of a prompt in OpenAI's form."""
    if isinstance(content, str):
        return {"type": "text", "text": content}
    if isinstance(content, BinaryContent) and (content.is_image or content.is_audio):
        kind = "image" if content.is_image else "audio"
        return {"type": kind, kind: content.data}
    if isinstance(content, ImageUrl):
        return {"type": "image_url", "image_url": {"url": content.url}}
    hint = "; give its bytes as BinaryContent" if hasattr(content, "url") else ""
    raise InputError(
        f"this adapter takes text, pictures and sounds, got a {type(content).__name__}{hint}"
    )


def _response(message: ModelResponse) -> dict[str, Any]:
    text = "".join(part.content for part in message.parts if isinstance(part, TextPart))
    calls = [
        {
            "id": part.tool_call_id,
            "function": {"name": part.tool_name, "arguments": part.args_as_json_str()},
        }
        for part in message.parts
        if isinstance(part, ToolCallPart)
    ]
    turn = {"role": "assistant", "content": text}
    return {**turn, "tool_calls": calls} if calls else turn


def _offered(
    settings: Any, asked: ModelRequestParameters
) -> tuple[str | None, list[dict[str, Any]]]:
    """Returns whether to call, and which tools to show: those that `tool_choice` leaves."""
    choice: Any = resolve_tool_choice(settings, asked)
    word, names = (choice, None) if isinstance(choice, str) else choice
    every = (*asked.function_tools, *asked.output_tools) if word != "none" else ()
    tools = [_tool(one) for one in every if names is None or one.name in names]
    return (word if tools else None), tools


def _tool(tool: Any) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description or "",
        "parameters": tool.parameters_json_schema,
    }
    return {"type": "function", "function": function}
