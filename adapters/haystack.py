"""Haystack: a chat generator over an ensemble.

pipeline.add_component("llm", EnsembleChatGenerator("my-ensemble", generation_kwargs={"specialists": ["medical"]}))
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any

from haystack import component, default_from_dict, default_to_dict
from haystack.dataclasses import (
    ChatMessage,
    ComponentInfo,
    StreamingChunk,
    ToolCall,
    ToolCallDelta,
)
from haystack.tools import (
    deserialize_tools_or_toolset_inplace,
    flatten_tools_or_toolsets,
    serialize_tools_or_toolset,
)
from haystack.utils import deserialize_callable, serialize_callable

from rc_agents.errors import InputError
from rc_agents.service import (
    Conversation,
    GenerationParams,
    GenerationResult,
    GenerationService,
    form_of,
    settings_over,
    unblocked,
)

FORMS = ("tool_choice", "parallel_tool_calls", "response_format")
"""What `generation_kwargs` may hold beside `GenerationParams`'s own names."""
LOADING = threading.Lock()
"""Held while an ensemble is loaded, as several calls at once may be the first."""


@component
class EnsembleChatGenerator:
    """An ensemble as a chat generator of Haystack.

    Args:
        model: a folder, id or `package:NAME`; a live ensemble or a service over one too, where the pipeline is not
            saved.
        tools: that answers may call: tools, toolsets, or a list of both.
        streaming_callback: takes chunks as they come: text in pieces, then each call whole, then why the answer ended.
        generation_kwargs: `max_tokens`, `tool_choice`, `parallel_tool_calls`, `response_format` (OpenAI's form or a
            pydantic class) and what `GenerationParams` takes; `run` may pass its own.

    Raises:
        InputError: an option that is not known, or cannot work.

    A call that `max_tokens` cuts is none of the reply's; its meta tells it under `invalid_tool_calls`.
    """

    def __init__(
        self,
        model: Any,
        tools: Any = None,
        streaming_callback: Any = None,
        generation_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.tools, self.streaming_callback = model, tools, streaming_callback
        self.generation_kwargs = generation_kwargs or {}
        GenerationParams.of(self.generation_kwargs, others=FORMS)
        self._service: GenerationService | None = None

    def warm_up(self) -> None:
        """Loads the ensemble, once."""
        with LOADING:
            if self._service is None:
                self._service = GenerationService.of(self.model)

    def to_dict(self) -> dict[str, Any]:
        """For a saved pipeline.

        Raises:
            InputError: the ensemble is a live one.
        """
        if not isinstance(self.model, str):
            raise InputError(
                "a generator is saved by its model's path or id; this one holds a live ensemble"
            )
        asked, show = dict(self.generation_kwargs), self.streaming_callback
        if "response_format" in asked:
            asked["response_format"] = form_of(asked["response_format"])
        return default_to_dict(
            self,
            model=self.model,
            tools=serialize_tools_or_toolset(self.tools),
            streaming_callback=None if show is None else serialize_callable(show),
            generation_kwargs=asked,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EnsembleChatGenerator:
        """From a saved pipeline."""
        held = data["init_parameters"]
        deserialize_tools_or_toolset_inplace(held, key="tools")
        if held.get("streaming_callback"):
            held["streaming_callback"] = deserialize_callable(held["streaming_callback"])
        found: EnsembleChatGenerator = default_from_dict(cls, data)
        return found

    @component.output_types(replies=list[ChatMessage])
    def run(
        self,
        messages: list[ChatMessage] | str,
        generation_kwargs: dict[str, Any] | None = None,
        tools: Any = None,
        streaming_callback: Any = None,
    ) -> dict[str, list[ChatMessage]]:
        """Answers a chat.

        Raises:
            InputError: messages, tools or options that cannot work, or a callback that only `run_async` can await.
        """
        show = streaming_callback or self.streaming_callback
        talk, params = self._plan(messages, generation_kwargs, tools)
        with self._loaded.stream(talk.prompt, params) as stream:
            chunks = _Chunks(self)
            for piece in talk.pieces(stream):
                _show(show, chunks.push(piece))
            _show(show, chunks.end(stream.result))
            return {"replies": [chunks.message(stream.result, self._loaded.model.name_or_path)]}

    @component.output_types(replies=list[ChatMessage])
    async def run_async(
        self,
        messages: list[ChatMessage] | str,
        generation_kwargs: dict[str, Any] | None = None,
        tools: Any = None,
        streaming_callback: Any = None,
    ) -> dict[str, list[ChatMessage]]:
        """Answers a chat without blocking the event loop; a callback may be a coroutine function.

        Raises:
            InputError: as `run`.
        """
        show = streaming_callback or self.streaming_callback
        talk, params = await asyncio.to_thread(self._plan, messages, generation_kwargs, tools)
        async with self._loaded.stream(talk.prompt, params) as stream:
            chunks = _Chunks(self)
            async for piece in unblocked(talk.pieces(stream)):
                await _shown(show, chunks.push(piece))
            await _shown(show, chunks.end(stream.result))
            return {"replies": [chunks.message(stream.result, self._loaded.model.name_or_path)]}

    @property
    def _loaded(self) -> GenerationService:
        self.warm_up()
        assert self._service is not None
        return self._service

    def _plan(
        self, messages: Any, own: dict[str, Any] | None, tools: Any
    ) -> tuple[Conversation, GenerationParams]:
        asked = settings_over(self.generation_kwargs, own or {})
        params = GenerationParams.of(asked, others=FORMS)
        if isinstance(messages, str):
            messages = [ChatMessage.from_user(messages)]
        offered = flatten_tools_or_toolsets(tools if tools is not None else self.tools)
        talk = self._loaded.converse(
            [one.to_openai_dict_format(require_tool_call_ids=False) for one in messages],
            tools=[{"type": "function", "function": one.tool_spec} for one in offered] or None,
            tool_choice=asked.get("tool_choice"),
            parallel_tool_calls=bool(asked.get("parallel_tool_calls")),
            response_format=asked.get("response_format"),
        )
        return talk, talk.params(params)


class _Chunks:
    """An answer's pieces as Haystack's chunks, and the message that they make."""

    def __init__(self, generator: Any) -> None:
        self._from = ComponentInfo.from_component(generator)
        self.text = ""
        self.calls: list[ToolCall] = []
        self.broken: list[dict[str, str]] = []
        self._block, self._texts = -1, False

    def push(self, piece: Any) -> StreamingChunk:
        start = not (isinstance(piece, str) and self._texts)  # each call is a block of its own
        self._block, self._texts = self._block + start, isinstance(piece, str)
        if isinstance(piece, str):
            self.text += piece
            return self._chunk(piece, index=self._block, start=start)
        found = ToolCallDelta(len(self.calls + self.broken), piece.name, piece.text, piece.id)
        if piece.arguments is None:  # cut, or no JSON object
            self.broken.append({"name": piece.name, "arguments": piece.text})
        else:
            self.calls.append(ToolCall(piece.name, piece.arguments, piece.id))
        return self._chunk("", index=self._block, start=start, tool_calls=[found])

    def end(self, result: GenerationResult) -> StreamingChunk:
        reason = "length" if result.finish_reason == "timeout" else self.reason(result)
        return self._chunk("", finish_reason=reason)

    def _chunk(self, content: str, **more: Any) -> StreamingChunk:
        return StreamingChunk(content=content, component_info=self._from, **more)

    def reason(self, result: GenerationResult) -> str:
        called = self.calls and result.finish_reason == "stop"
        return "tool_calls" if called else result.finish_reason

    def message(self, result: GenerationResult, name: str) -> ChatMessage:
        tokens = result.prompt_tokens, result.completion_tokens
        usage = dict(zip(("prompt_tokens", "completion_tokens"), tokens, strict=True))
        meta: dict[str, Any] = {
            "model": name,
            "index": 0,
            "finish_reason": self.reason(result),
            "usage": {**usage, "total_tokens": sum(tokens)},
        }
        if self.broken:
            meta["invalid_tool_calls"] = self.broken
        return ChatMessage.from_assistant(
            self.text or None, tool_calls=self.calls or None, meta=meta
        )


def _show(show: Any, chunk: StreamingChunk) -> None:
    if show is not None and inspect.isawaitable(waits := show(chunk)):
        if inspect.iscoroutine(waits):
            waits.close()
        raise InputError(
            "run() cannot await a streaming callback; call run_async(), or pass a plain function"
        )


async def _shown(show: Any, chunk: StreamingChunk) -> None:
    if show is not None and inspect.isawaitable(waits := show(chunk)):
        await waits
