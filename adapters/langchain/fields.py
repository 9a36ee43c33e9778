"""What the chat model and the text model have in common: where the ensemble is, and how it generates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from langchain_core.runnables.config import run_in_executor
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rc_agents import CoupledForCausalLM
from rc_agents.errors import InputError, nearest
from rc_agents.service import (
    CHOICES,
    LIMITS,
    GenerationParams,
    GenerationResult,
    GenerationService,
)

LIVE = "live:"
CONVERSING = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
"""What a chat may be asked for besides, under the same name as in `GenerationService.converse`."""


T = TypeVar("T")


class Source:
    """The ensemble behind an adapter: loaded at the first use, and shared by the adapter's copies.

    Args:
        name: folder, hub id or `package:NAME`.
        options: for the loader.
        service: of an ensemble that is loaded already.
    """

    def __init__(
        self, name: str, options: dict[str, Any], service: GenerationService | None = None
    ) -> None:
        self.name, self.options = name, options
        self._service = service
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Source], tuple[str, dict[str, Any]]]:
        """Pickles as its name: another process loads it again."""
        return Source, (self.name, self.options)

    @classmethod
    def of(cls, model: Any, options: dict[str, Any]) -> Source:
        """Returns the source that the `model` of an adapter names or is."""
        if isinstance(model, (str, Path)):
            return cls(str(model), options)
        service = GenerationService(model, options.get("processors"))
        return cls(model.name_or_path or LIVE + "+".join(model.names), options, service)

    def get(self) -> GenerationService:
        """Returns the service; loads it where that was not done yet."""
        with self._lock:
            if self._service is None:
                if self.name.startswith(LIVE):
                    raise InputError(
                        f"{self.name!r} was an ensemble in the memory of another process; save it with "
                        "save_pretrained and pass its path"
                    )
                options = {key: value for key, value in self.options.items() if value is not None}
                self._service = GenerationService.of(self.name, **options)
            return self._service


class CoupledFields(BaseModel):
    """Fields and parameters of both adapters.

    Args:
        model: a saved ensemble (folder or hub id), a single base model (the same, or `package:NAME`), or a live
            `CoupledForCausalLM`.
        max_tokens: at most so many new tokens; also `max_new_tokens`.
        temperature, top_p, top_k, seed, stop, specialists, strength, timeout, logit_bias: as in `GenerationParams`,
            here or in any call.
        device_map, dtype: for loading, as in `rc_agents.couple`.
        processors: as for `GenerationService`, for pictures and sounds in messages.
        max_retries, api_key: accepted as every LangChain model does; no request leaves this process.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: list[str] | None = None
    specialists: list[str] | None = None
    strength: float | dict[str, float] | None = None
    timeout: float | None = None
    logit_bias: dict[int, float] | None = None
    device_map: Any = None
    dtype: Any = None
    processors: Any = Field(default=None, exclude=True, repr=False)
    max_retries: int | None = Field(default=None, exclude=True)
    api_key: Any = Field(default=None, exclude=True, repr=False)
    source: Any = Field(default=None, exclude=True, repr=False)

    _more: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _find_source(cls, values: Any) -> Any:
        """Turns the model into its name, and keeps what holds it; copies of an adapter bring theirs along."""
        if not isinstance(values, dict) or "model" not in values:
            return values
        values, model = dict(values), values["model"]
        if not isinstance(model, (str, Path, CoupledForCausalLM)):
            raise InputError(
                "model is a saved ensemble's folder or id, a base model's, or a live CoupledForCausalLM (make one "
                f"with rc_agents.couple), got {type(model).__name__}"
            )
        kept = values.get("source")
        options = {key: _written(values.get(key)) for key in ("device_map", "dtype")}
        values |= {key: value for key, value in options.items() if value is not None}
        options["processors"] = values.get("processors")
        if kept is None or (kept.name, kept.options) != (str(model), options):
            values["source"] = Source.of(model, options)
        values["model"] = values["source"].name
        if values["model"].startswith(LIVE):
            values.setdefault("cache", False)  # it may change under a cached answer
        return values

    def model_post_init(self, context: Any, /) -> None:
        """Checks the parameters."""
        super().model_post_init(context)
        self._params(None, {})

    @classmethod
    def from_pretrained(cls, model: str | Path, **fields: Any) -> Self:
        """Makes an adapter and loads its ensemble at once, instead of at the first call."""
        made = cls(model=str(model), **fields)
        made.source.get()
        return made

    @property
    def _identifying_params(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("max_tokens", *CHOICES)}
        return {"model_name": self.model} | {
            key: value for key, value in fields.items() if value is not None
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        """What LangSmith shows about a call."""
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)  # type: ignore[misc]
        return params | {"ls_provider": "rc_agents"}

    def get_token_ids(self, text: str) -> list[int]:
        """Returns the anchor's tokens of a text."""
        return list(self.source.get().encode(text).token_ids) if text else []

    def _params(self, stop: list[str] | None, kwargs: dict[str, Any]) -> GenerationParams:
        """The fields, and over them what a call says."""
        known = sorted({*LIMITS, "model", "stream", *CHOICES, *self._more})
        for name in kwargs.keys() - {*known, "ls_structured_output_format"}:
            raise InputError(
                f"{type(self).__name__} got an unknown argument {name!r}; {nearest(name, known)}"
            )
        if kwargs.get("model", self.model) != self.model:
            raise InputError(
                f"this object answers with {self.model!r}; make another one for {kwargs['model']!r}"
            )
        limits = [kwargs[name] for name in LIMITS if name in kwargs]
        choices = {name: kwargs.get(name, getattr(self, name)) for name in CHOICES}
        choices["stop"] = (self.stop or ()) if stop is None else stop
        return GenerationParams(max_new_tokens=limits[0] if limits else self.max_tokens, **choices)

    def _metadata(self, result: GenerationResult, calls: bool = False) -> dict[str, Any]:
        ended = calls and result.finish_reason == "stop"
        return {
            "model_name": self.model,
            "model_provider": "rc_agents",
            "finish_reason": "tool_calls" if ended else result.finish_reason,
        }


async def in_thread(run: Callable[[threading.Event], T]) -> T:
    """Runs what ends early once its event is set, in a thread; it is set where whoever waits is cancelled."""
    left = threading.Event()
    try:
        return await run_in_executor(None, run, left)
    finally:
        left.set()


def _written(value: Any) -> Any:
    """A device or a type as JSON can hold it."""
    if isinstance(value, Mapping):
        return {name: _written(one) for name, one in value.items()}
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value).removeprefix("torch.")
    return value
