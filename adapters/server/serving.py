"""What a server knows while it runs: the ensemble, the names it answers to, and the way from a request to its rows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request

from rc_agents.errors import ConfigError, ContextError, nearest
from rc_agents.service import GenerationParams, GenerationService, Prompt

from .batching import Batcher
from .errors import Refused
from .jobs import Job
from .limits import Limits
from .metrics import Metrics
from .requests import Generation


@dataclass
class Serving:
    """A service behind its names.

    Args:
        service: of the ensemble.
        name: that it is called by; `NAME:a+b` is the same with the specialists a and b alone, `NAME:none` without any.
        limits: what is let in.
        metrics: what is counted.
    """

    service: GenerationService
    name: str
    limits: Limits
    metrics: Metrics

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set(":+ ") or not self.name.isprintable():
            raise ConfigError(
                f"a model's name has no colon, plus or space, as those pick specialists; got {self.name!r}"
            )
        self.started = int(time.time())
        self.batcher = Batcher(self.service, self.limits, self.metrics.rows.observe)

    @property
    def names(self) -> list[str]:
        """What models are listed: all, each specialist alone, and none."""
        specialists = self.service.model.specialists
        return [self.name, *(f"{self.name}:{one}" for one in specialists)] + (
            [f"{self.name}:none"] if specialists else []
        )

    def specialists(self, model: str) -> list[str] | None:
        """Reads a model's name; returns who takes part, None for all.

        Raises:
            Refused: it is not served here (404).
        """
        name, separator, chosen = model.partition(":")
        if name != self.name or (separator and not chosen):
            raise self._unknown(model)
        if not separator:
            return None
        names = [] if chosen == "none" else list(dict.fromkeys(chosen.split("+")))
        if not set(names) <= set(self.service.model.specialists):
            raise self._unknown(model)
        return names

    def _unknown(self, model: str) -> Refused:
        said = f"the model {model!r} is not served here; {nearest(model, self.names)}; join specialists with '+'"
        return Refused(404, said, param="model", code="model_not_found")

    def params(self, body: Generation, limit: int | None, top: int | None) -> GenerationParams:
        """Returns how a request's rows are generated.

        Args:
            body: the request.
            limit: new tokens that it asks for; None for the usual number, or the server's limit where that is less.
            top: likeliest tokens that it wants to see, None for none.

        Raises:
            Refused, InputError: a value beyond the limits, or one that cannot work.
        """
        if limit is not None and limit > self.limits.max_tokens:
            raise Refused(
                400,
                f"max_tokens is at most {self.limits.max_tokens}, got {limit}",
                param="max_tokens",
            )
        if body.n is not None and body.n > self.limits.choices:
            raise Refused(400, f"n is at most {self.limits.choices}, got {body.n}", param="n")
        if limit is None and self.service.default_limit() > self.limits.max_tokens:
            limit = self.limits.max_tokens
        params = GenerationParams(
            max_new_tokens=limit,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            seed=body.seed,
            stop=body.stop or (),
            specialists=self.specialists(body.model),
            strength=body.strength,
            logit_bias=_bias(body.logit_bias),
            logprobs=top,
            attribution=bool(body.attribution),
        )
        self.service.check(params)
        return params

    def jobs(
        self,
        body: Generation,
        prompts: Sequence[Prompt],
        params: GenerationParams,
        loop: asyncio.AbstractEventLoop,
        host: str,
    ) -> list[Job]:
        """Returns a request's rows, `n` for each prompt, in order of `index`.

        Raises:
            Refused, InputError: a prompt that is too long, or too many rows.
        """
        number = body.n or 1
        if len(prompts) * number > self.limits.choices:
            raise Refused(
                400,
                f"a request has at most {self.limits.choices} answers, got {len(prompts)} prompts with n={number}",
            )
        for prompt in prompts:
            size = len(prompt.token_ids)
            if size > self.limits.prompt_tokens:
                raise Refused(
                    400,
                    f"the prompt has {size} tokens; this server takes {self.limits.prompt_tokens}",
                    code="context_length_exceeded",
                )
        seconds = min(body.timeout or self.limits.seconds, self.limits.seconds)
        deadline = time.monotonic() + seconds
        asker = asker_of(body, host)
        made = []
        for prompt in prompts:
            self.fits(prompt, params)
            for place in range(number):
                one = params if params.seed is None else _seeded(params, place)
                made.append(Job(prompt, one, deadline, asker, _loop=loop))
        return made

    def fits(self, prompt: Prompt, params: GenerationParams) -> None:
        """Raises `Refused` where the prompt is too long for one of its models."""
        try:
            self.service.fits_beside([], (prompt, params))
        except ContextError as error:
            raise Refused(400, str(error), code="context_length_exceeded") from error


def asker_of(body: Generation, host: str) -> str:
    """Returns who asks: the host that a request came from, and its `user`."""
    return f"{host} {body.user or ''}"


def _seeded(params: GenerationParams, place: int) -> GenerationParams:
    return replace(params, seed=(params.seed or 0) + place)


def _bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    if wrong := [key for key in given if not key.isdecimal()]:
        raise Refused(
            400, f"logit_bias has token ids as keys, got {wrong[0]!r}", param="logit_bias"
        )
    if any(not -100 <= value <= 100 for value in given.values()):
        raise Refused(400, "a logit_bias lies between -100 and 100", param="logit_bias")
    return {int(key): value for key, value in given.items()}


def host_of(request: Request) -> str:
    """Returns where a request came from."""
    return request.client.host if request.client else ""


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Returns tokens as OpenAI counts them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
