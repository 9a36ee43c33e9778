"""What a caller may ask of one generation, checked once."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..errors import InputError, nearest
from .guides import Guide

MOST_LOGPROBS = 100
CHOICES = (
    *("temperature", "top_p", "top_k", "seed", "stop", "timeout"),
    *("logit_bias", "specialists", "strength"),
)
"""What a caller of any framework may choose about an answer, by the name that it has in `GenerationParams`."""
LIMITS = ("max_tokens", "max_new_tokens")
"""The names under which frameworks say how long an answer may be; the first that is given counts."""


@dataclass(frozen=True, kw_only=True)
class GenerationParams:
    """How one row is generated; None leaves a choice to the model's own generation config.

    Args:
        max_new_tokens: at most so many tokens; None for the model's own limit or 256, and never past the context.
        temperature: 0 for the likeliest token at each step, above it samples; None as the model says, else 0.
        top_p: sample from the likeliest tokens that together have this probability, above 0 and at most 1.
        top_k: sample from so many of the likeliest tokens; 0 for all of them.
        seed: makes the samples this row's own, whatever else runs; row r of a batch with one seed draws from seed + r.
        stop: a string or several; the text ends before the first that appears.
        specialists: names that take part; None for all, an empty list for the anchor alone.
        strength: factor on every bridge's update, or a dict by specialist; None for 1.
        guide: the form that the whole text keeps to, such as `Guide.json_schema({...})`; None for free text.
        logit_bias: token id, as a number or its digits -> what is added to its score before anything else.
        logprobs: keep each token's log-probability and so many of the likeliest ones, 0 to 100; None for none.
        attribution: keep how much each specialist added where each token was chosen.
        timeout: seconds after which the text so far is returned with finish_reason "timeout"; None for no limit.

    Raises:
        InputError: a value that cannot work.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    specialists: Sequence[str] | None = None
    strength: float | Mapping[str, float] | None = None
    timeout: float | None = None
    guide: Guide | None = None
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    attribution: bool = False

    @classmethod
    def of(
        cls, asked: Mapping[str, Any], *, others: Collection[str] | None = None, **own: Any
    ) -> Self:
        """Returns the parameters among a framework's settings: `CHOICES` and `LIMITS`, where they are not None.

        Args:
            asked: the settings.
            others: names beside these that are the framework's own; None lets any others pass.
            own: parameters that count whatever is asked.

        Raises:
            InputError: a value that cannot work, or a name that is neither.
        """
        known = sorted({*CHOICES, *LIMITS, *(others or ())})
        for name in asked if others is not None else ():
            if name not in known and asked[name] is not None:
                raise InputError(f"an ensemble has no option {name!r}; {nearest(name, known)}")
        given = {name: asked[name] for name in CHOICES if asked.get(name) is not None}
        limits = [asked[name] for name in LIMITS if asked.get(name) is not None]
        return cls(**{"max_new_tokens": limits[0] if limits else None, **given, **own})

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, least=1)
        _check_integer("top_k", self.top_k, least=0)
        _check_integer("logprobs", self.logprobs, least=0)
        if (self.logprobs or 0) > MOST_LOGPROBS:
            raise InputError(f"logprobs is at most {MOST_LOGPROBS}, got {self.logprobs}")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _by_token(self.logit_bias))
        for token, added in (self.logit_bias or {}).items():
            _check_integer("a token of logit_bias", token, least=0)
            _check_number("logit_bias", added, "a token", lambda _: True)
        _check_integer("seed", self.seed)
        _check_number("temperature", self.temperature, "of at least 0", lambda value: value >= 0)
        _check_number("top_p", self.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
        _check_number("timeout", self.timeout, "above 0", lambda value: value > 0)
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise InputError(
                f"guide is a Guide, such as Guide.choice(['yes', 'no']), got {type(self.guide).__name__}"
            )
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "specialists", _names(self.specialists))
        for value in (
            self.strength.values() if isinstance(self.strength, Mapping) else [self.strength]
        ):
            _check_number("strength", value, "or a dict of them by specialist", lambda _: True)


def settings_over(own: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a call's settings over an object's own; the call's limit counts by whichever of its names."""
    if any(asked.get(name) is not None for name in LIMITS):
        own = {name: value for name, value in own.items() if name not in LIMITS}
    return {**own, **asked}


def _by_token(given: Any) -> dict[Any, Any]:
    """A bias by token ids; JSON's objects have them as strings."""
    if not isinstance(given, Mapping):
        raise InputError(f"logit_bias is a dict by token id, got {type(given).__name__}")
    found: dict[Any, Any] = {}
    for token, added in given.items():
        key = int(token) if isinstance(token, str) and token.isdecimal() else token
        if key is None or added is None or key in found:
            raise InputError(f"logit_bias has one number for a token id, got {given!r:.120}")
        found[key] = added
    return found


def _check_integer(name: str, value: Any, least: int | None = None) -> None:
    right = (
        isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
    )
    if value is not None and not right:
        bound = "" if least is None else f" of at least {least}"
        raise InputError(f"{name} is an integer{bound}, got {value!r}")


def _check_number(name: str, value: Any, expected: str, holds: Any) -> None:
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not (right and holds(value)):
        raise InputError(f"{name} is a finite number {expected}, got {value!r}")


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if strings is None:
        return ()
    if not isinstance(strings, Sequence) or not all(
        isinstance(one, str) and one for one in strings
    ):
        raise InputError(
            f"stop is a string or a list of strings, none of them empty, got {value!r}"
        )
    return tuple(dict.fromkeys(strings))


def _names(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not all(isinstance(one, str) for one in value)
    ):
        raise InputError(f"specialists is a list of names, got {value!r}")
    return tuple(value)
