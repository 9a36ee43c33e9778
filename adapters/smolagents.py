"""smolagents: a model over an ensemble.

agent = ToolCallingAgent(tools=[...], model=EnsembleModel("my-ensemble", specialists=["medical"]))
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smolagents.models import (
    REMOVE_PARAMETER,
    ChatMessage,
    ChatMessageStreamDelta,
    ChatMessageToolCall,
    ChatMessageToolCallFunction,
    MessageRole,
    Model,
    TokenUsage,
)

from rc_agents import CoupledForCausalLM
from rc_agents.service import Conversation, GenerationParams, GenerationService, lines

OWN = ("tool_choice", "response_format", "tool_name_key", "tool_arguments_key")
"""What the framework takes among a model's options."""


class EnsembleModel(Model):
    """An ensemble as a model of smolagents.

    Args:
        model: a live ensemble, a service over one, or its folder, id or `package:NAME`.
        specialists: who takes part; None for all.
        strength: factor on the bridges, or a dict by specialist.
        options: `max_tokens`, `temperature`, `top_p`, `top_k`, `seed`, `timeout`, `stop`, `logit_bias` for every call.

    Raises:
        InputError: an option that is not known, or cannot work.
    """

    def __init__(
        self,
        model: CoupledForCausalLM | GenerationService | str | Path,
        *,
        specialists: Sequence[str] | None = None,
        strength: float | Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        said = {name: one for name, one in options.items() if one is not REMOVE_PARAMETER}
        GenerationParams.of(said, others=OWN)  # before any model is loaded
        self.chosen = GenerationParams(specialists=specialists, strength=strength)
        self.service = GenerationService.of(model)
        name = self.service.model.name_or_path or "rc_agents"
        super().__init__(model_id=name, **options)

    @property
    def supports_stop_parameter(self) -> bool:
        """It stops before any string."""
        return True

    def generate(self, messages: list[Any], *args: Any, **kwargs: Any) -> ChatMessage:
        """Answers a chat; arguments as in the base class."""
        talk, params = self._plan(messages, *args, **kwargs)
        result = self.service.generate(talk.prompt, params)
        reply = talk.read(result.text)
        calls = [
            ChatMessageToolCall(
                id=one.id,
                type="function",
                function=ChatMessageToolCallFunction(
                    name=one.name, arguments=one.text if one.arguments is None else one.arguments
                ),
            )
            for one in reply.tool_calls
        ]
        return ChatMessage(
            role=MessageRole.ASSISTANT,
            content=reply.content,
            tool_calls=calls or None,
            raw=result,
            token_usage=TokenUsage(result.prompt_tokens, result.completion_tokens),
        )

    def generate_stream(
        self, messages: list[Any], *args: Any, **kwargs: Any
    ) -> Generator[ChatMessageStreamDelta]:
        """Answers a chat piece by piece; calls come whole, with the text that they are written as."""
        talk, params = self._plan(messages, *args, **kwargs)
        with self.service.stream(talk.prompt, params) as stream:
            for text in stream:
                yield ChatMessageStreamDelta(content=text)
            result = stream.result
        usage = TokenUsage(result.prompt_tokens, result.completion_tokens)
        yield ChatMessageStreamDelta(content="", token_usage=usage)

    def _plan(
        self, messages: list[Any], *args: Any, **kwargs: Any
    ) -> tuple[Conversation, GenerationParams]:
        kwargs["convert_images_to_image_urls"] = True
        asked = self._prepare_completion_kwargs(messages, *args, **kwargs)
        talk = self.service.converse(
            [_turn(one) for one in asked.pop("messages")],
            tools=asked.pop("tools", None),
            tool_choice=asked.pop("tool_choice", None),
            response_format=asked.pop("response_format", None),
        )
        own = {"specialists": self.chosen.specialists, "strength": self.chosen.strength}
        params = GenerationParams.of({**own, **asked}, others=())
        return talk, talk.params(params)


def _turn(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message["content"]
    return {**message, "content": lines(content)} if isinstance(content, list) else message
