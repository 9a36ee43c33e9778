"""CrewAI: a model over an ensemble.

agent = Agent(role="coder", goal="...", backstory="...", llm=EnsembleLLM("my-ensemble", specialists=["medical"]))
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crewai import BaseLLM
from crewai.events.types.llm_events import LLMCallType
from crewai.llms.base_llm import llm_call_context
from pydantic import PrivateAttr

from rc_agents import CoupledForCausalLM
from rc_agents.errors import InputError
from rc_agents.service import Conversation, GenerationParams, GenerationResult, GenerationService

PARAMS = ("temperature", "top_p", "seed")
UNSUPPORTED = ("frequency_penalty", "presence_penalty")
NO_LIMIT = 1 << 20
ROOM = 0.85
"""Part of the context that CrewAI fills before it sums up a conversation."""


class EnsembleLLM(BaseLLM):
    """An ensemble as a model of CrewAI.

    Args:
        model: a live ensemble, a service over one, or its folder, id or `package:NAME`.
        specialists: who takes part; None for all.
        strength: factor on the bridges, or a dict by specialist.
        tool_choice: where a call has tools: None or "auto", "required", or a tool's name.
        top_k: sample from so many of the likeliest tokens.
        logit_bias: token id -> what is added to its score.
        timeout: seconds of an answer at most.
        options: of every call: `max_tokens`, `temperature`, `top_p`, `seed`, `stop`, `stream`.

    Raises:
        InputError: an option that is not known, or cannot work.
    """

    llm_type: str = "rc_agents"
    _service: GenerationService = PrivateAttr()
    _chosen: dict[str, Any] = PrivateAttr()
    _tool_choice: str | None = PrivateAttr()

    def __init__(
        self,
        model: CoupledForCausalLM | GenerationService | str | Path,
        *,
        specialists: Sequence[str] | None = None,
        strength: float | Mapping[str, float] | None = None,
        tool_choice: str | None = None,
        top_k: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> None:
        service = GenerationService.of(model)
        name = service.model.name_or_path or "rc_agents"
        super().__init__(model=name, provider="rc_agents", **options)
        unknown = [*self.additional_params, *(one for one in UNSUPPORTED if getattr(self, one))]
        if unknown or (self.n or 1) != 1:
            raise InputError(f"an ensemble has no option {[*unknown, 'n'][0]!r}; leave it out")
        self._service, self._tool_choice = service, tool_choice
        self._chosen = {
            "specialists": specialists,
            "strength": strength,
            "top_k": top_k,
            "logit_bias": logit_bias,
            "timeout": timeout,
        }
        self._params()

    def call(
        self,
        messages: str | list[Any],
        tools: list[dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        available_functions: dict[str, Any] | None = None,
        from_task: Any = None,
        from_agent: Any = None,
        response_model: Any = None,
    ) -> Any:
        """Answers a chat.

        Returns:
            The text; an object of `response_model` where it is given; or, where the answer calls tools, what the first
            call's function returns, and the calls in OpenAI's form where there are no `available_functions`.

        Raises:
            InputError: messages, tools or options that cannot work.
            ValueError: an answer that is no object of `response_model`, or a call without arguments, as one that
                `max_tokens` cuts.
        """
        task = {"from_task": from_task, "from_agent": from_agent}
        with llm_call_context():
            self._emit_call_started_event(
                messages=messages, tools=tools, available_functions=available_functions, **task
            )
            try:
                turns = self._format_messages(messages)
                self._invoke_before_llm_call_hooks(turns, from_agent)
                talk = self._talk(turns, tools, response_model)
                result = self._generate(talk, task)
                return self._read(talk, result, turns, available_functions, response_model, task)
            except Exception as error:
                self._emit_call_failed_event(error=str(error), **task)
                raise

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Answers a chat in a thread; arguments and errors as in `call`."""
        return await asyncio.to_thread(self.call, *args, **kwargs)

    def supports_function_calling(self) -> bool:
        """Calls are guided, so every ensemble can make them."""
        return True

    def get_context_window_size(self) -> int:
        """The anchor's tokens that a conversation may fill."""
        limit = self._service.context_limit()
        return int(ROOM * limit[1]) if limit else NO_LIMIT

    def get_input_tokens_count(
        self, messages: str | list[Any], tools: Any = None, response_model: Any = None
    ) -> int:
        """The anchor's tokens of a request."""
        talk = self._talk(self._format_messages(messages), tools, response_model)
        return len(talk.prompt.token_ids)

    def _talk(self, turns: list[Any], tools: Any, response_model: Any) -> Conversation:
        form = None
        if response_model is not None:
            schema = {"schema": response_model.model_json_schema(), "strict": True}
            form = {"type": "json_schema", "json_schema": schema}
        if any(one.get("files") for one in turns):
            raise InputError(
                "an ensemble reads no input files of CrewAI's; show a picture as a part of a message's content, "
                '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
            )
        choice = self._tool_choice if tools else None
        return self._service.converse(turns, tools=tools, tool_choice=choice, response_format=form)

    def _params(self) -> GenerationParams:
        limit = None if self.max_tokens is None else int(self.max_tokens)
        known = {name: getattr(self, name) for name in PARAMS}
        return GenerationParams(
            max_new_tokens=limit, stop=self.stop_sequences, **known, **self._chosen
        )

    def _generate(self, talk: Conversation, task: dict[str, Any]) -> GenerationResult:
        with self._service.stream(talk.prompt, talk.params(self._params())) as stream:
            for piece in talk.pieces(stream):
                if self._effective_stream() and isinstance(piece, str):
                    self._emit_stream_chunk_event(piece, call_type=LLMCallType.LLM_CALL, **task)
            return stream.result

    def _read(
        self,
        talk: Conversation,
        result: GenerationResult,
        turns: list[Any],
        functions: dict[str, Any] | None,
        response_model: Any,
        task: dict[str, Any],
    ) -> Any:
        usage = {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": result.completion_tokens,
            "total_tokens": result.prompt_tokens + result.completion_tokens,
        }
        self._track_token_usage_internal(usage)
        reply = talk.read(result.text)
        if reply.tool_calls and functions:
            first = reply.tool_calls[0]
            if first.arguments is None:
                raise ValueError(
                    f"the call of {first.name!r} has no JSON object for its arguments, got {first.text!r:.120}; give "
                    "the answer more max_tokens"
                )
            return self._handle_tool_execution(first.name, first.arguments, functions, **task)
        answer: Any = [_call(one) for one in reply.tool_calls]
        kind = LLMCallType.TOOL_CALL if answer else LLMCallType.LLM_CALL
        if not answer:
            said = self._invoke_after_llm_call_hooks(turns, reply.content, task["from_agent"])
            answer = self._validate_structured_output(said, response_model)
        self._emit_call_completed_event(
            answer, kind, messages=turns, usage=usage, finish_reason=result.finish_reason, **task
        )
        return answer


def _call(call: Any) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.text}
    return {"id": call.id, "type": "function", "function": function}
