"""The bodies of requests, as OpenAI's API has them; what is not supported is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SILENT = ("store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity")
"""Fields of OpenAI's API that change nothing here."""


class StreamOptions(BaseModel):
    """What a stream has besides its pieces."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class Generation(BaseModel):
    """What both ways of asking share.

    `timeout`, `strength` and `attribution` are ours: seconds until the answer has to be there, a factor on bridges (or
    one by specialist), and how much each specialist added to each token.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    strength: float | dict[str, float] | None = None
    attribution: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_silent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if key not in SILENT}

    @model_validator(mode="after")
    def _check(self) -> Generation:
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported; leave it out or at 0")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def limit(self) -> int | None:
        """New tokens at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """Likeliest tokens wanted at each place, None for no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [one for one in self.prompt if isinstance(one, int)]
        return [tokens] if tokens else [one for one in self.prompt if not isinstance(one, int)]
