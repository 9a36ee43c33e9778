"""The chat model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    convert_to_openai_messages,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables.config import RunnableConfig, get_config_list, run_in_executor
from pydantic import ConfigDict

from rc_agents import RCError
from rc_agents.errors import InputError
from rc_agents.service import GenerationResult, Prompt

from .fields import CoupledFields
from .together import answer, together


class ChatCoupled(CoupledFields, BaseChatModel):
    """A LangChain chat model over an ensemble; fields as in `CoupledFields`.

    A batch is one `generate` call (`max_concurrency` bounds its rows). Tools and structured output are not there yet.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    streaming: bool = False

    @property
    def _llm_type(self) -> str:
        return "rc-agents-chat"

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Returns how many of the anchor's tokens the rendered chat takes."""
        if tools:
            raise InputError("ChatCoupled does not support 'tools' yet")
        return len(self._prompt(messages).token_ids)

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
            with together(self._prompts(part)):
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
            with together(await run_in_executor(None, self._prompts, part)):
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
        params = self._params(stop, kwargs)
        result = answer(self.source.get(), self._prompt(messages), params)
        message = AIMessage(
            content=result.text,
            usage_metadata=_usage(result),
            response_metadata=self._metadata(result),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        params = self._params(stop, kwargs)
        with self.source.get().stream(self._prompt(messages), params) as stream:
            for text in stream:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
                if run_manager:
                    run_manager.on_llm_new_token(text, chunk=chunk)
                yield chunk
            end = AIMessageChunk(
                content="",
                usage_metadata=_usage(stream.result),
                response_metadata=self._metadata(stream.result),
                chunk_position="last",
            )
            yield ChatGenerationChunk(message=end)

    def _prompt(self, messages: list[BaseMessage]) -> Prompt:
        return self.source.get().render([_plain(message) for message in messages])

    def _prompts(self, inputs: list[LanguageModelInput]) -> list[Prompt]:
        """The prompts of a batch, without those that cannot be rendered and will say so themselves."""
        prompts = []
        for one in inputs:
            try:
                prompts.append(self._prompt(self._convert_input(one).to_messages()))
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


def _plain(message: BaseMessage) -> dict[str, str]:
    """A message's role and text; what is no text is refused."""
    converted = convert_to_openai_messages(message, text_format="block")
    if converted.get("tool_calls") or converted["role"] in ("tool", "function"):
        raise InputError(
            f"ChatCoupled does not support tools yet, got a {type(message).__name__} that uses them"
        )
    content = converted.get("content") or ""
    blocks = [content] if isinstance(content, str) else content
    return {"role": converted["role"], "content": "".join(_text(block) for block in blocks)}


def _text(block: Any) -> str:
    if isinstance(block, str):
        return block
    if block.get("type") != "text":
        raise InputError(
            f"the ensemble reads text only, got a content block of type {block.get('type')!r}"
        )
    return block["text"]
