"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from rc_agents.errors import InputError
from rc_agents.service import GenerationParams, GenerationResult, Prompt

from .answers import gather, sent, stream
from .chat import REASONS
from .jobs import Job
from .records import contributions, text_logprobs
from .requests import CompletionRequest
from .serving import Serving, host_of, usage

USUAL_TOKENS = 16  # of OpenAI's API, where a request says nothing


def routes(serving: Serving) -> APIRouter:
    """Returns the route."""
    router = APIRouter()

    @router.post("/v1/completions", tags=["generate"])
    async def completions(body: CompletionRequest, request: Request) -> Any:
        usual = min(USUAL_TOKENS, serving.limits.max_tokens)
        limit = usual if body.limit is None else body.limit
        params = serving.params(body, limit, body.logprobs)
        scored = bool(body.echo) and body.logprobs is not None
        if body.stream and (scored or body.max_tokens == 0):
            raise InputError("a stream does not echo log-probabilities; ask without stream")
        loop = asyncio.get_running_loop()
        jobs = await run_in_threadpool(_jobs, serving, body, params, loop, host_of(request))
        for job in jobs:
            job.reads = scored
        if body.stream:
            return sent(serving, jobs, _chunks(serving, body, jobs))
        results = await gather(serving, request, jobs)
        return _whole(serving, body, jobs, results)

    return router


def _prompt(serving: Serving, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        return serving.service.encode(given)
    size = serving.service.model.config.vocab_size
    if not given or not all(isinstance(one, int) and 0 <= one < size for one in given):
        raise InputError(f"a prompt of tokens has ids from 0 to {size - 1}, at least one of them")
    return Prompt(tuple(given), continues=True)


def _jobs(
    serving: Serving,
    body: CompletionRequest,
    params: GenerationParams,
    loop: asyncio.AbstractEventLoop,
    host: str,
) -> list[Job]:
    return serving.jobs(body, [_prompt(serving, one) for one in body.prompts], params, loop, host)


def _head(body: CompletionRequest) -> dict[str, Any]:
    made = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
    return {**made, "created": int(time.time()), "model": body.model}


def _whole(
    serving: Serving,
    body: CompletionRequest,
    jobs: Sequence[Job],
    results: Sequence[GenerationResult],
) -> dict[str, Any]:
    choices = []
    if body.max_tokens == 0:  # asked for the prompt's own tokens alone
        results = [
            replace(one, text="", tokens=(), completion_tokens=0, finish_reason="length")
            for one in results
        ]
    for index, (job, result) in enumerate(zip(jobs, results, strict=True)):
        choice = {
            "index": index,
            "text": (_text(serving, job.prompt) if body.echo else "") + result.text,
            "finish_reason": REASONS.get(result.finish_reason, result.finish_reason),
            "logprobs": None,
        }
        if body.logprobs is not None:
            choice["logprobs"] = text_logprobs(serving, (*job.read, *result.tokens))
        if body.attribution:
            choice["attribution"] = contributions(serving, result)
        if result.lost:
            choice["lost_specialists"] = result.lost
        choices.append(choice)
    return {**_head(body), "choices": choices, "usage": _usage(body, results)}


def _usage(body: CompletionRequest, results: Sequence[GenerationResult]) -> dict[str, Any]:
    read = sum(one.prompt_tokens for one in results) // (body.n or 1)
    return usage(read, sum(one.completion_tokens for one in results))


async def _chunks(
    serving: Serving, body: CompletionRequest, jobs: Sequence[Job]
) -> AsyncIterator[dict[str, Any]]:
    head = _head(body)
    results: list[GenerationResult] = []

    def chunk(index: int, text: str, reason: str | None = None, logprobs: Any = None) -> Any:
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return {**head, "choices": [choice]}

    if body.echo:
        for index, job in enumerate(jobs):
            yield chunk(index, _text(serving, job.prompt))
    async for index, piece in stream(serving, jobs):
        if isinstance(piece, str):
            yield chunk(index, piece)
            continue
        results.append(piece)
        kept = text_logprobs(serving, piece.tokens) if body.logprobs is not None else None
        yield chunk(index, "", REASONS.get(piece.finish_reason, piece.finish_reason), kept)
    if body.stream_options is not None and body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": _usage(body, results)}


def _text(serving: Serving, prompt: Prompt) -> str:
    tokenizer = serving.service.model.tokenizer
    return str(tokenizer.decode(list(prompt.token_ids), skip_special_tokens=True))
