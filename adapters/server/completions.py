"""`POST /v1/completions`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from rc_agents.errors import InputError
from rc_agents.service import GenerationParams, GenerationResult, Prompt, TokenRecord

from .answers import gather, sent, stream
from .batching import Job
from .chat import REASONS
from .errors import refusal
from .records import contributions, text_logprobs
from .requests import CompletionRequest
from .serving import Serving, usage


def routes(serving: Serving) -> APIRouter:
    """Returns the route."""
    router = APIRouter()

    @router.post("/v1/completions", tags=["generate"])
    async def completions(body: CompletionRequest, request: Request) -> Any:
        params = serving.params(body, body.max_tokens or 16, body.logprobs)
        prompts = [_prompt(serving, one) for one in body.prompts]
        jobs = serving.jobs(body, prompts, params)
        if body.stream:
            if body.echo and body.logprobs is not None:
                raise InputError("a stream does not echo log-probabilities; ask without stream")
            serving.batcher.submit(jobs)
            events = _events(serving, body, jobs)
            return sent(serving, events)
        results = await gather(serving, request, jobs)
        read = await run_in_threadpool(_read, serving, body, prompts, params)
        return _whole(serving, body, prompts, results, read)

    return router


def _prompt(serving: Serving, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        return serving.service.encode(given)
    size = serving.service.model.config.vocab_size
    if not given or not all(isinstance(one, int) and 0 <= one < size for one in given):
        raise InputError(f"a prompt of tokens has ids from 0 to {size - 1}, at least one of them")
    return Prompt(tuple(given), continues=True)


def _read(
    serving: Serving,
    body: CompletionRequest,
    prompts: Sequence[Prompt],
    params: GenerationParams,
) -> list[tuple[TokenRecord, ...]]:
    """The prompts' own tokens, where they are echoed with their probabilities."""
    if not body.echo or body.logprobs is None:
        return [() for _ in prompts]
    return [serving.service.score(prompt, params) for prompt in prompts]


def _head(body: CompletionRequest) -> dict[str, Any]:
    made = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
    return {**made, "created": int(time.time()), "model": body.model}


def _whole(
    serving: Serving,
    body: CompletionRequest,
    prompts: Sequence[Prompt],
    results: Sequence[GenerationResult],
    read: Sequence[tuple[TokenRecord, ...]],
) -> dict[str, Any]:
    each = len(results) // len(prompts)
    choices = []
    for index, result in enumerate(results):
        prompt = prompts[index // each]
        choice = {
            "index": index,
            "text": (_text(serving, prompt) if body.echo else "") + result.text,
            "finish_reason": REASONS.get(result.finish_reason, result.finish_reason),
            "logprobs": None,
        }
        if body.logprobs is not None:
            records = (*read[index // each], *result.tokens)
            choice["logprobs"] = text_logprobs(serving, records)
        if body.attribution:
            choice["attribution"] = contributions(serving, result)
        choices.append(choice)
    counted = usage(
        sum(len(one.token_ids) for one in prompts), sum(one.completion_tokens for one in results)
    )
    return {**_head(body), "choices": choices, "usage": counted}


async def _events(
    serving: Serving, body: CompletionRequest, jobs: Sequence[Job]
) -> AsyncIterator[str]:
    head = _head(body)
    results: list[GenerationResult] = []

    def chunk(index: int, text: str, reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return json.dumps({**head, "choices": [choice]}, ensure_ascii=False)

    try:
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
            read = sum(one.prompt_tokens for one in results) // (body.n or 1)
            counted = usage(read, sum(one.completion_tokens for one in results))
            yield json.dumps({**head, "choices": [], "usage": counted})
        yield "[DONE]"
    except Exception as error:
        yield json.dumps(refusal(error).body())


def _text(serving: Serving, prompt: Prompt) -> str:
    tokenizer = serving.service.model.tokenizer
    return str(tokenizer.decode(list(prompt.token_ids), skip_special_tokens=True))
