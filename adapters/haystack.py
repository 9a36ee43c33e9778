"""Haystack: a chat generator over an ensemble.

pipeline.add_component("llm", EnsembleChatGenerator("my-ensemble", specialists=["medical"]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from haystack import component, default_from_dict, default_to_dict
from haystack.dataclasses import ChatMessage, StreamingChunk, ToolCall

from rc_agents.errors import InputError
from rc_agents.service import GenerationParams, GenerationService


@component
class EnsembleChatGenerator:
    """An ensemble as a chat generator of Haystack.

    Args:
        model: a folder, id or `package:NAME`; a live ensemble too, where the pipeline is not saved.
        tools: that answers may call.
        streaming_callback: takes chunks as they come.
        generation_kwargs: `max_tokens`, `tool_choice`, `response_format` and what `GenerationParams` takes; `run` may
            pass its own.
    """

    def __init__(
        self,
        model: Any,
        tools: Sequence[Any] | None = None,
        streaming_callback: Any = None,
        generation_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.tools, self.streaming_callback = model, tools, streaming_callback
        self.generation_kwargs = generation_kwargs or {}
        self._service: GenerationService | None = None

    def warm_up(self) -> None:
        """Loads the ensemble."""
        if self._service is None:
            self._service = GenerationService.of(self.model)

    def to_dict(self) -> dict[str, Any]:
        """For a saved pipeline.

        Raises:
            InputError: the ensemble is a live one, or there are tools or a callback.
        """
        if not isinstance(self.model, str) or self.tools or self.streaming_callback:
            raise InputError(
                "a generator is saved by its model's path or id, without tools and callbacks; pass those to run()"
            )
        return default_to_dict(self, model=self.model, generation_kwargs=self.generation_kwargs)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EnsembleChatGenerator:
        """From a saved pipeline."""
        found: EnsembleChatGenerator = default_from_dict(cls, data)
        return found

    @component.output_types(replies=list[ChatMessage])
    def run(
        self,
        messages: list[ChatMessage],
        generation_kwargs: dict[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        streaming_callback: Any = None,
    ) -> dict[str, list[ChatMessage]]:
        """Answers a chat."""
        self.warm_up()
        assert self._service is not None
        asked = {**self.generation_kwargs, **(generation_kwargs or {})}
        given = [
            {"type": "function", "function": one.tool_spec} for one in tools or self.tools or ()
        ]
        talk = self._service.converse(
            [one.to_openai_dict_format(require_tool_call_ids=False) for one in messages],
            tools=given or None,
            tool_choice=asked.get("tool_choice"),
            response_format=asked.get("response_format"),
        )
        params = talk.params(GenerationParams.of(asked))
        show = streaming_callback or self.streaming_callback
        with self._service.stream(talk.prompt, params) as stream:
            for text in stream:
                if show is not None:
                    show(StreamingChunk(content=text))
            result = stream.result
        reply = talk.read(result.text)
        calls = [
            ToolCall(tool_name=one.name, arguments=one.arguments, id=one.id)
            for one in reply.tool_calls
            if one.arguments is not None
        ]
        meta = {
            "model": self._service.model.name_or_path,
            "finish_reason": "tool_calls" if calls else result.finish_reason,
            "usage": {
                "prompt_tokens": result.prompt_tokens,
                "completion_tokens": result.completion_tokens,
            },
        }
        answer = ChatMessage.from_assistant(
            reply.content or None, tool_calls=calls or None, meta=meta
        )
        return {"replies": [answer]}
