"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from rc_agents.service import Conversation, GenerationResult, ToolCall

from .answers import gather, sent, stream
from .jobs import Job
from .records import chat_logprobs, contributions
from .requests import ChatRequest
from .serving import Serving, asker_of, host_of, usage

REASONS = {"timeout": "length"}


def routes(serving: Serving) -> APIRouter:
    """Returns the route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", tags=["generate"])
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        params = serving.params(body, body.limit, body.top)
        with serving.batcher.place(asker_of(body, host_of(request)), body.n or 1):
            talk = await run_in_threadpool(_converse, serving, body)
        chosen, loop = talk.params(params), asyncio.get_running_loop()
        jobs = await run_in_threadpool(
            serving.jobs, body, [talk.prompt], chosen, loop, host_of(request)
        )
        if body.stream:
            return sent(serving, jobs, _chunks(serving, body, talk, jobs))
        results = await gather(serving, request, jobs)
        return _whole(serving, body, talk, results)

    return router


def _converse(serving: Serving, body: ChatRequest) -> Conversation:
    return serving.service.converse(
        [_message(one) for one in body.messages],
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=bool(body.parallel_tool_calls),
        response_format=body.response_format,
    )


def _message(given: dict[str, Any]) -> dict[str, Any]:
    """A message as the service takes it."""
    content = given.get("content")
    role = "system" if given.get("role") == "developer" else given.get("role")
    if content is None and given.get("tool_calls"):
        content = ""
    return {**given, "role": role, "content": content}


def _head(body: ChatRequest, kind: str) -> dict[str, Any]:
    made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
    return {**made, "model": body.model}


def _whole(
    serving: Serving, body: ChatRequest, talk: Conversation, results: Sequence[GenerationResult]
) -> dict[str, Any]:
    choices = []
    for index, result in enumerate(results):
        reply = talk.read(result.text)
        calls = [_call(one) for one in reply.tool_calls]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": reply.content if reply.content or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        choice = {
            "index": index,
            "message": message,
            "finish_reason": _reason(result, bool(calls)),
            "logprobs": chat_logprobs(serving, result) if body.logprobs else None,
        }
        if body.attribution:
            choice["attribution"] = contributions(serving, result)
        if result.lost:
            choice["lost_specialists"] = result.lost
        choices.append(choice)
    counted = usage(results[0].prompt_tokens, sum(one.completion_tokens for one in results))
    return {**_head(body, "chat.completion"), "choices": choices, "usage": counted}


async def _chunks(
    serving: Serving, body: ChatRequest, talk: Conversation, jobs: Sequence[Job]
) -> AsyncIterator[dict[str, Any]]:
    head = _head(body, "chat.completion.chunk")
    readers = [talk.reader() for _ in jobs]
    calls = [0] * len(jobs)
    results: list[GenerationResult] = []
    for index in range(len(jobs)):
        yield {**head, "choices": [_delta(index, {"role": "assistant", "content": ""})]}
    async for index, piece in stream(serving, jobs):
        for one in _read(readers[index], piece):
            delta: dict[str, Any] = {"content": one}
            if isinstance(one, ToolCall):
                delta = {"tool_calls": [{"index": calls[index], **_call(one)}]}
                calls[index] += 1
            yield {**head, "choices": [_delta(index, delta)]}
        if isinstance(piece, GenerationResult):
            results.append(piece)
            end = _delta(index, {}, _reason(piece, calls[index] > 0))
            if body.logprobs:
                end["logprobs"] = chat_logprobs(serving, piece)
            if body.attribution:
                end["attribution"] = contributions(serving, piece)
            if piece.lost:
                end["lost_specialists"] = piece.lost
            yield {**head, "choices": [end]}
    if body.stream_options is not None and body.stream_options.include_usage:
        tokens = sum(one.completion_tokens for one in results)
        yield {**head, "choices": [], "usage": usage(results[0].prompt_tokens, tokens)}


def _read(reader: Any, piece: str | GenerationResult) -> list[str | ToolCall]:
    """What is known of an answer with one more piece of it; a result is its end."""
    if isinstance(piece, str):
        return [piece] if reader is None else list(reader.push(piece))
    return [] if reader is None else list(reader.finish())


def _delta(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.text}
    return {"id": call.id, "type": "function", "function": function}


def _reason(result: GenerationResult, calls: bool) -> str:
    reason = REASONS.get(result.finish_reason, result.finish_reason)
    return "tool_calls" if calls and reason == "stop" else reason
