"""What comes of a row, and requests that may join others while these are being answered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..modeling import CoupledForCausalLM
from . import running
from .going import Answer, Calls, Going
from .params import GenerationParams
from .prompts import PromptLike
from .rows import Row
from .trace import TokenRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt that may join others while these are being answered.

    Args:
        prompt: a text, a chat or a rendered prompt.
        params: how to generate.
        cancel: once set, the row ends within one token with finish_reason "cancelled".
        begun: called before the prompt is read, while no row runs, so that it may use the ensemble.
        sink: takes its text as it comes.
        ended: takes its result as soon as it has ended.
    """

    prompt: PromptLike
    params: GenerationParams = field(default_factory=GenerationParams)
    cancel: threading.Event | None = None
    begun: Callable[[], None] = lambda: None
    sink: Callable[[str], None] | None = None
    ended: Callable[[GenerationResult], None] | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """One answer.

    Attributes:
        text: without stop strings, end-of-text and other special tokens.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, an end-of-text token and those of a stop string included.
        finish_reason: "stop" (end of text, or a stop string), "length", "cancelled", "timeout", or "error" where the
            row's guide could not be followed, or in continuous batching whatever failed; only `ended` hears of the
            last, all else raises it.
        error: what went wrong with this row alone, where it ended with "error".
        tokens: what was kept of each token, where `logprobs` or `attribution` asked for it.
        lost: specialists in other processes that took no part from some token on, and why.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    tokens: tuple[TokenRecord, ...] = ()
    error: Exception | None = None
    lost: dict[str, str] = field(default_factory=dict)


def entered(
    model: CoupledForCausalLM,
    request: Request,
    plan: Callable[[Request], Row],
    raised: list[Exception],
) -> Going | None:
    """Returns a request on its way; None where it cannot be answered, of which it is told.

    Args:
        model: the ensemble.
        request: that joins.
        plan: decides the request's row.
        raised: takes what its callbacks raise.
    """
    ended = None if request.ended is None else _guarded(request.ended, raised)
    try:
        row = plan(request)
        calls = Calls(
            stopped=lambda: request.cancel is not None and request.cancel.is_set(),
            begun=request.begun,
            sink=None if request.sink is None else _guarded(request.sink, raised),
            ended=None if ended is None else lambda answer: ended(result(row, answer)),
        )
        return running.begin(model, [row], [calls])[0]
    except Exception as error:
        if ended is None:
            raise
        ended(
            GenerationResult(
                text="", prompt_tokens=0, completion_tokens=0, finish_reason="error", error=error
            )
        )
        return None


def _guarded(call: Callable[[Any], None], raised: list[Exception]) -> Callable[[Any], None]:
    """The callback, whose errors are kept, so that they are not taken for those of a pass."""

    def guarded(value: Any) -> None:
        try:
            call(value)
        except Exception as error:
            raised.append(error)

    return guarded


def result(row: Row, answer: Answer) -> GenerationResult:
    """Returns what has come of a row."""
    reader = answer.reader
    return GenerationResult(
        text=reader.text,
        prompt_tokens=row.size,
        completion_tokens=reader.count,
        finish_reason=str(reader.finish_reason),
        tokens=answer.records,
        error=answer.error,
        lost=dict(answer.lost),
    )
