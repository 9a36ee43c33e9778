"""LlamaIndex: a model over an ensemble.

Settings.llm = EnsembleLLM("my-ensemble", specialists=["medical"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM

from rc_agents import CoupledForCausalLM
from rc_agents.errors import InputError
from rc_agents.service import (
    GenerationParams,
    GenerationResult,
    GenerationService,
    Prompt,
    PromptLike,
    lines,
    settings_over,
)

NO_LIMIT = 1 << 20
UNREAD = ("thinking", "cache")
"""Kinds of content that are not said again."""


class EnsembleLLM(CustomLLM):
    """An ensemble as a model of LlamaIndex.

    Args:
        model: a live ensemble, a service over one, or its folder, id or `package:NAME`.
        options: `max_tokens` and what `GenerationParams` takes, for every call; each call may pass its own.

    Raises:
        InputError: an option that is not known, or cannot work.
    """

    _service: GenerationService = PrivateAttr()
    _options: Mapping[str, Any] = PrivateAttr()

    def __init__(
        self, model: CoupledForCausalLM | GenerationService | str | Path, **options: Any
    ) -> None:
        super().__init__()
        self._options = options
        self._params({})  # before any model is loaded
        self._service = GenerationService.of(model)

    @classmethod
    def class_name(cls) -> str:
        """The name in LlamaIndex's registry."""
        return "rc_agents"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans prompts by."""
        limit = self._service.context_limit()
        return LLMMetadata(
            context_window=limit[1] if limit else NO_LIMIT,
            num_output=self._params({}).max_new_tokens or 256,
            is_chat_model=bool(getattr(self._service.model.tokenizer, "chat_template", None)),
            model_name=self._service.model.name_or_path or "rc_agents",
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Goes on from a text."""
        result = self._service.generate(prompt, self._params(kwargs))
        return CompletionResponse(text=result.text, raw=_raw(result))

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Goes on from a text, piece by piece."""
        for delta, text, raw in self._pieces(prompt, kwargs):
            yield CompletionResponse(text=text, delta=delta, raw=raw)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answers a chat by each model's own template."""
        result = self._service.generate(self._prompt(messages), self._params(kwargs))
        return ChatResponse(message=_says(result.text), raw=_raw(result))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answers a chat, piece by piece."""
        for delta, text, raw in self._pieces(self._prompt(messages), kwargs):
            yield ChatResponse(message=_says(text), delta=delta, raw=raw)

    def _prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        turns = [{"role": one.role.value, "content": _content(one)} for one in messages]
        return self._service.converse(turns).prompt

    def _params(self, kwargs: Mapping[str, Any]) -> GenerationParams:
        return GenerationParams.of(settings_over(self._options, kwargs), others=())

    def _pieces(self, prompt: PromptLike, kwargs: Mapping[str, Any]) -> Any:
        text = ""
        with self._service.stream(prompt, self._params(kwargs)) as stream:
            for delta in stream:
                text += delta
                yield delta, text, None
            yield "", text, _raw(stream.result)


def _content(message: ChatMessage) -> str | list[Mapping[str, Any]]:
    """A message's text, with the pictures and sounds that its blocks hold."""
    blocks = [one for one in message.blocks if one.block_type not in UNREAD]
    if all(one.block_type == "text" for one in blocks):
        return message.content or ""
    return lines([_part(one) for one in blocks])


def _part(block: Any) -> dict[str, Any]:
    if block.block_type == "text":
        return {"type": "text", "text": block.text}
    if block.block_type not in ("image", "audio"):
        raise InputError(
            f"this adapter takes text, pictures and sounds, got a block of type {block.block_type!r}"
        )
    kind, url = block.block_type, None if block.url is None else str(block.url)
    held = block.image if kind == "image" else block.audio
    if held is None and block.path is not None:
        return {"type": kind, kind: Path(block.path)}
    if held is None and kind == "image" and url is not None and url.startswith("data:"):
        return {"type": "image_url", "image_url": {"url": url}}
    if held is None:
        raise InputError(
            f"nothing is fetched, so a block of type {kind!r} holds bytes or a path, got the url {url!r:.60}"
        )
    read = block.resolve_image() if kind == "image" else block.resolve_audio()
    return {"type": kind, kind: read.read()}


def _says(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def _raw(result: GenerationResult) -> dict[str, Any]:
    """What LlamaIndex's token counters read."""
    tokens = result.prompt_tokens, result.completion_tokens
    usage = {
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "total_tokens": sum(tokens),
    }
    return {"usage": usage, "finish_reason": result.finish_reason}
