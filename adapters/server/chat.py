"""`POST /v1/chat/completions`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from rc_agents.errors import InputError
from rc_agents.service import Conversation, GenerationResult, ToolCall
from rc_agents.service.tools import CallReader

from .answers import gather, sent, stream
from .batching import Job
from .errors import refusal
from .records import chat_logprobs, contributions
from .requests import ChatRequest
from .serving import Serving, usage

REASONS = {"cancelled": "stop", "timeout": "length"}


def routes(serving: Serving) -> APIRouter:
    """Returns the route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", tags=["generate"])
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        params = serving.params(body, body.limit, body.top)
        talk = await run_in_threadpool(_converse, serving, body)
        jobs = serving.jobs(body, [talk.prompt], talk.params(params))
        if body.stream:
            serving.batcher.submit(jobs)
            events = _events(serving, body, talk, jobs)
            return sent(serving, events)
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
    """A message whose content is text, also where it came in parts.

    Raises:
        InputError: a part that is no text.
    """
    content = given.get("content")
    role = "system" if given.get("role") == "developer" else given.get("role")
    if isinstance(content, list):
        content = "".join(_text(part) for part in content)
    if content is None and given.get("tool_calls"):
        content = ""
    return {**given, "role": role, "content": content}


def _text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InputError(f"the ensemble reads text only, got a content part of type {kind!r}")
    return str(part["text"])


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
        choices.append(choice)
    counted = usage(results[0].prompt_tokens, sum(one.completion_tokens for one in results))
    return {**_head(body, "chat.completion"), "choices": choices, "usage": counted}


async def _events(
    serving: Serving, body: ChatRequest, talk: Conversation, jobs: Sequence[Job]
) -> AsyncIterator[str]:
    head = _head(body, "chat.completion.chunk")
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        return json.dumps({**head, "choices": choices, **more}, ensure_ascii=False)

    readers = [CallReader() if talk.calls else None for _ in jobs]
    numbers = [0] * len(jobs)
    results: list[GenerationResult] = []
    try:
        for index in range(len(jobs)):
            yield chunk([_delta(index, {"role": "assistant", "content": ""})])
        async for index, piece in stream(serving, jobs):
            reader = readers[index]
            if isinstance(piece, str):
                found = [piece] if reader is None else reader.push(piece)
            else:
                found = [] if reader is None else reader.finish()
            for one in found:
                if isinstance(one, str):
                    yield chunk([_delta(index, {"content": one})])
                else:
                    call = {"index": numbers[index], **_call(one)}
                    numbers[index] += 1
                    yield chunk([_delta(index, {"tool_calls": [call]})])
            if isinstance(piece, GenerationResult):
                results.append(piece)
                end = _delta(index, {}, _reason(piece, numbers[index] > 0))
                if body.logprobs:
                    end["logprobs"] = chat_logprobs(serving, piece)
                if body.attribution:
                    end["attribution"] = contributions(serving, piece)
                yield chunk([end])
        if with_usage:
            tokens = sum(one.completion_tokens for one in results)
            yield chunk([], usage=usage(results[0].prompt_tokens, tokens))
        yield "[DONE]"
    except Exception as error:
        yield json.dumps(refusal(error).body())


def _delta(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.text}
    return {"id": call.id, "type": "function", "function": function}


def _reason(result: GenerationResult, calls: bool) -> str:
    reason = REASONS.get(result.finish_reason, result.finish_reason)
    return "tool_calls" if calls and reason == "stop" else reason
