"""The chat model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ToolCallChunk,
    convert_to_openai_messages,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.base import OutputParserLike
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.runnables.config import RunnableConfig, get_config_list, run_in_executor
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, ConfigDict

from rc_agents import RCError
from rc_agents.errors import InputError
from rc_agents.service import (
    Conversation,
    GenerationResult,
    Prompt,
    Reply,
    ToolCall,
    check_tools,
)

from .fields import CONVERSING, CoupledFields, in_thread
from .together import answer, together


class ChatCoupled(CoupledFields, BaseChatModel):
    """A LangChain chat model over an ensemble; fields as in `CoupledFields`.

    A batch is one `generate` call (`max_concurrency` bounds its rows). Tools and structured output are guided, so that
    a call always names a tool that is there and JSON always keeps to its schema; they need the extra `structured`.
    """

    _more: ClassVar[tuple[str, ...]] = CONVERSING

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    streaming: bool = False

    @property
    def _llm_type(self) -> str:
        return "rc-agents-chat"

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Returns how many of the anchor's tokens the rendered chat takes."""
        given = [convert_to_openai_tool(tool) for tool in tools or ()]
        return len(self._conversation(messages, {"tools": given}).prompt.token_ids)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Returns the model with tools that its answers may call.

        Args:
            tools: in any form that LangChain knows.
            tool_choice: "auto", "none", "any" (also "required", True) for some call, a tool's name, or OpenAI's form.
            parallel_tool_calls: whether one answer may hold several calls; by default one.
            strict: accepted; calls always keep to their schema.
            kwargs: more arguments of a call.

        Raises:
            InputError: a tool or choice of another form.
        """
        formatted = [convert_to_openai_tool(tool) for tool in tools]
        check_tools(formatted, tool_choice)
        chosen = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        return self.bind(
            tools=formatted,
            **{name: value for name, value in chosen.items() if value is not None},
            **kwargs,
        )

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """Returns the model with answers of a schema.

        Args:
            schema: a pydantic class, a TypedDict, a JSON schema or a tool in OpenAI's form; `json_mode` does without.
            method: `json_schema` guides the answer by the schema, `function_calling` has it call a tool of that schema,
                `json_mode` guides it to be a JSON object alone.
            include_raw: return `raw`, `parsed` and `parsing_error`.
            strict: accepted; answers always keep to the schema.
            kwargs: more arguments of a call.

        Raises:
            InputError: an unknown method, or no schema where one is needed.
        """
        if schema is None and method != "json_mode":
            raise InputError(f"method {method!r} needs a schema")
        model = isinstance(schema, type) and is_basemodel_subclass(schema)
        parser: OutputParserLike[Any]
        parser = PydanticOutputParser(pydantic_object=schema) if model else JsonOutputParser()  # type: ignore[arg-type]
        seen = {"kwargs": {"method": method}, "schema": schema}
        if method == "function_calling":
            tool = convert_to_openai_tool(schema)  # type: ignore[arg-type]
            name = tool["function"]["name"]
            bound = self.bind_tools([tool], tool_choice=name, **kwargs)
            parser = (
                PydanticToolsParser(tools=[schema], first_tool_only=True)  # type: ignore[list-item]
                if model
                else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
            )
        elif method == "json_schema":
            form = convert_to_json_schema(schema)  # type: ignore[arg-type]
            named = {"name": form.get("title", "answer"), "schema": form, "strict": True}
            bound = self.bind(
                response_format={"type": "json_schema", "json_schema": named}, **kwargs
            )
        elif method == "json_mode":
            bound = self.bind(response_format={"type": "json_object"}, **kwargs)
        else:
            raise InputError(
                f"method is json_schema, function_calling or json_mode, got {method!r}"
            )
        bound = bound.bind(ls_structured_output_format=seen)
        if not include_raw:
            return bound | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=bound) | parsed.with_fallbacks(
            [failed], exception_key="parsing_error"
        )

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answers the inputs in one generation, or in several of `max_concurrency` inputs each."""
        outputs = []
        for part, configs in _parts(inputs, config):
            with together(self._prompts(part, kwargs)):
                outputs += super().batch(
                    part, configs, return_exceptions=return_exceptions, **kwargs
                )
        return outputs

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """The same, without holding up the event loop."""
        outputs = []
        for part, configs in _parts(inputs, config):
            with together(await run_in_executor(None, self._prompts, part, kwargs)):
                outputs += await super().abatch(
                    part, configs, return_exceptions=return_exceptions, **kwargs
                )
        return outputs

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._answer(messages, stop, kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await in_thread(partial(self._answer, messages, stop, kwargs))

    def _answer(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        kwargs: dict[str, Any],
        left: threading.Event | None = None,
    ) -> ChatResult:
        asked = self._conversation(messages, kwargs)
        params = asked.params(self._params(stop, kwargs))
        result = answer(self.source.get(), asked.prompt, params, left)
        reply = asked.read(result.text)
        message = AIMessage(
            content=reply.content,
            **_calls(reply),
            usage_metadata=_usage(result),
            response_metadata=self._metadata(result, bool(reply.tool_calls)),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        asked = self._conversation(messages, kwargs)
        params = asked.params(self._params(stop, kwargs))
        calls = 0
        with self.source.get().stream(asked.prompt, params) as stream:
            for piece in asked.pieces(stream):
                if isinstance(piece, str):
                    message = AIMessageChunk(content=piece)
                else:
                    message = AIMessageChunk(content="", tool_call_chunks=[_chunk(piece, calls)])
                    calls += 1
                chunk = ChatGenerationChunk(message=message)
                if run_manager:
                    run_manager.on_llm_new_token(message.text, chunk=chunk)
                yield chunk
            end = AIMessageChunk(
                content="",
                usage_metadata=_usage(stream.result),
                response_metadata=self._metadata(stream.result, bool(calls)),
                chunk_position="last",
            )
            yield ChatGenerationChunk(message=end)

    def _conversation(self, messages: list[BaseMessage], kwargs: Mapping[str, Any]) -> Conversation:
        chosen = {name: kwargs[name] for name in CONVERSING if kwargs.get(name) is not None}
        plain = [one for message in messages for one in _plain(message)]
        return self.source.get().converse(plain, **chosen)

    def _prompts(self, inputs: list[LanguageModelInput], kwargs: Mapping[str, Any]) -> list[Prompt]:
        """The prompts of a batch, without those that cannot be rendered and will say so themselves."""
        prompts = []
        for one in inputs:
            try:
                messages = self._convert_input(one).to_messages()
                prompts.append(self._conversation(messages, kwargs).prompt)
            except (RCError, ValueError):
                continue
        return prompts


def _parts(inputs: list[Any], config: Any) -> Iterator[tuple[list[Any], list[RunnableConfig]]]:
    """Inputs with their configs, in parts that may run at once."""
    configs = get_config_list(config, len(inputs)) if inputs else []
    size = (configs[0].get("max_concurrency") if configs else None) or max(1, len(inputs))
    for start in range(0, len(inputs), size):
        yield inputs[start : start + size], configs[start : start + size]


def _usage(result: GenerationResult) -> UsageMetadata:
    counts = result.prompt_tokens, result.completion_tokens
    return UsageMetadata(input_tokens=counts[0], output_tokens=counts[1], total_tokens=sum(counts))


def _calls(reply: Reply) -> dict[str, Any]:
    """The calls as a message holds them: those that can be made, and those whose arguments are no JSON object."""
    valid = [
        tool_call(name=one.name, args=one.arguments, id=one.id)
        for one in reply.tool_calls
        if one.arguments is not None
    ]
    invalid = [
        invalid_tool_call(
            name=one.name, args=one.text, id=one.id, error="arguments are no JSON object"
        )
        for one in reply.tool_calls
        if one.arguments is None
    ]
    return {"tool_calls": valid, "invalid_tool_calls": invalid}


def _chunk(call: ToolCall, index: int) -> ToolCallChunk:
    return tool_call_chunk(name=call.name, args=call.text, id=call.id, index=index)


def _plain(message: BaseMessage) -> list[dict[str, Any]]:
    """A message in OpenAI's form, as the service takes it."""
    converted = convert_to_openai_messages([message], text_format="block")
    return [{**one, "content": one.get("content") or ""} for one in converted]
