"""From texts and chats to prompts: what a service does before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..alignment.renderings import Message
from ..errors import InputError
from ..modeling import CoupledForCausalLM
from . import conversation as _conversation
from . import media as _media
from . import prompts as _prompts
from . import rows as _rows
from .conversation import Conversation
from .media import Media
from .params import GenerationParams
from .prompts import Prompt, PromptLike
from .senses import Senses


class Prompting:
    """Makes and measures prompts for an ensemble; see `GenerationService`."""

    def __init__(
        self, model: CoupledForCausalLM, processors: Mapping[str, Any] | None = None
    ) -> None:
        if not isinstance(model, CoupledForCausalLM):
            raise InputError(
                f"a service needs an ensemble, got {type(model).__name__}; make one with rc_agents.couple(...)"
            )
        if model.tokenizer is None:
            raise InputError(
                "the anchor has no tokenizer; couple with tokenizers={'anchor': tokenizer}"
            )
        self.model = model
        self._senses = Senses(model, processors)

    def render(self, messages: Sequence[Message], **template: Any) -> Prompt:
        """Renders a chat with each model's own template, up to where the assistant's turn begins.

        Args:
            messages: dicts with a `role` and a `content`: a string, or parts of which some are pictures or sounds
                (docs/multimodal.md), one of a kind in all.
            template: more variables for the templates.

        Raises:
            InputError: no messages, malformed ones, no template, messages that the template refuses, or a picture or
                sound that cannot be read or that no model takes.
        """
        texts, found = _media.split(messages)
        return self._showing(_prompts.render(self.model, texts, **template), found)

    def converse(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool = False,
        response_format: Mapping[str, Any] | None = None,
        **template: Any,
    ) -> Conversation:
        """Plans the answer to a chat that may call tools, or has to have a form.

        The answer's calls are guided, so that they always name a tool that is there and keep to its schema. Needs
        llguidance (extra `structured`) where there are tools or a form.

        Args:
            messages: as in `render`, in OpenAI's form also with `tool_calls` and of the role `tool`.
            tools: in OpenAI's form. A chat template that knows tools shows them; otherwise the system message does.
            tool_choice: None or "auto", "none", "required", a tool's name, or OpenAI's form of it.
            parallel_tool_calls: whether one answer may hold several calls.
            response_format: `{"type": "json_schema", "json_schema": {"schema": ...}}` or `{"type": "json_object"}`;
                beside tools it is the form of an answer that calls none.
            template: more variables for the templates.

        Returns:
            The prompt, the guide for `GenerationParams`, and how to read the answer.

        Raises:
            InputError: malformed messages, tools, choices or schemas.
        """
        texts, found = _media.split(messages)
        talk = _conversation.converse(
            self.model,
            texts,
            functions=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            template=template,
        )
        return replace(talk, prompt=self._showing(talk.prompt, found))

    def encode(self, text: str, parts: Sequence[Any] = ()) -> Prompt:
        """Turns plain text into a prompt to go on from.

        Args:
            text: at least one character.
            parts: pictures and sounds, as the parts of a chat's message.

        Raises:
            InputError: the text is empty or no string, or as in `render`.
        """
        texts, found = _media.split([{"content": parts}])
        if not isinstance(parts, (list, tuple)) or texts[0]["content"]:
            raise InputError(
                f"parts is a list of pictures and sounds, as in a chat's message, got {parts!r:.60}"
            )
        return self._showing(_prompts.encode(self.model.tokenizer, text), found)

    def blind(self) -> dict[str, str]:
        """Returns why encoders cannot be shown pictures or sounds, by name; nothing for those that can."""
        return self._senses.reasons()

    def modalities(self, specialists: Sequence[str] | None = None) -> list[str]:
        """Returns what prompts may hold: "text", and "image" or "audio" where an encoder can be shown it.

        Args:
            specialists: who takes part; None for all.
        """
        taken = {
            kind
            for name, kind in self._senses.kinds().items()
            if specialists is None or name in specialists
        }
        return ["text", *(said for kind, said in _media.MODALITIES.items() if kind in taken)]

    def prompt(self, prompt: PromptLike) -> Prompt:
        """Returns any form of prompt in the anchor's tokens."""
        if isinstance(prompt, Prompt):
            return prompt
        return self.encode(prompt) if isinstance(prompt, str) else self.render(prompt)

    def count_tokens(self, prompt: PromptLike) -> int:
        """Returns how many of the anchor's tokens a text or a rendered chat takes."""
        return 0 if prompt == "" else len(self.prompt(prompt).token_ids)

    def context_limit(self) -> tuple[str, int] | None:
        """Returns the model with the shortest context and that context in the anchor's tokens, None without a limit.

        A model with a tokenizer of its own counts in its own tokens; generation ends where it is full.
        """
        return _rows.context_limit(self.model)

    def token_bytes(self, token: int) -> bytes:
        """Returns what one of the anchor's tokens spells; nothing for a special one.

        Raises:
            TokenError: the anchor's tokenizer is of a kind that does not say.
        """
        return self.model.anchor_bytes().pieces[token]

    def default_limit(self) -> int:
        """Returns the new tokens of an answer for which nothing is asked."""
        return self.model.generation_config.max_new_tokens or _rows.DEFAULT_MAX_NEW_TOKENS

    def check(self, params: GenerationParams) -> None:
        """Raises `InputError` where the parameters name a specialist that this ensemble does not have."""
        _rows.check_choice(self.model, params)

    def _showing(self, prompt: Prompt, found: Sequence[Media]) -> Prompt:
        return replace(prompt, sources=self._senses.show(found)) if found else prompt
