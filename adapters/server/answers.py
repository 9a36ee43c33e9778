"""Waiting for a request's rows: whole or as a stream, until they are done or the client goes away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
from fastapi import Request
from sse_starlette import EventSourceResponse

from rc_agents.service import GenerationResult

from .errors import Refused, refusal
from .jobs import Job
from .serving import Serving

POLL = 0.1  # seconds between looks whether the client is still there


async def gather(serving: Serving, request: Request, jobs: Sequence[Job]) -> list[GenerationResult]:
    """Returns the results of all rows.

    Raises:
        Refused, RCError: what went wrong with the first row that failed; the others end too.
    """
    serving.batcher.submit(jobs)
    tasks = [asyncio.create_task(_whole(serving, job)) for job in jobs]
    try:
        while True:
            done, open_ones = await asyncio.wait(
                tasks, timeout=POLL, return_when=asyncio.FIRST_EXCEPTION
            )
            if not open_ones or any(task.exception() for task in done):
                return [task.result() for task in tasks if task in done]
            if await request.is_disconnected():
                raise Refused(499, "the client went away")
    finally:
        give_up(serving, jobs)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def events(
    serving: Serving, jobs: Sequence[Job], chunks: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[str]:
    """Yields chunks as JSON, then OpenAI's end; an error is a chunk of its own. What is left open ends with it."""
    try:
        async for chunk in chunks:
            yield json.dumps(chunk)
        yield "[DONE]"
    except Exception as error:
        yield json.dumps(refusal(error).body())
    finally:
        give_up(serving, jobs)


async def stream(
    serving: Serving, jobs: Sequence[Job]
) -> AsyncIterator[tuple[int, str | GenerationResult]]:
    """Yields (row, text) as it comes, and each row's result when it has ended; rows that are left open end."""
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def feed(row: int, job: Job) -> None:
        try:
            async for piece in job.pieces():
                await queue.put((row, piece))
        except Exception as error:
            await queue.put((row, error))

    tasks = [asyncio.create_task(feed(row, job)) for row, job in enumerate(jobs)]
    left = len(jobs)
    try:
        while left:
            row, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, GenerationResult):
                left -= 1
                count(serving, jobs[row], piece)
            yield row, piece
    finally:
        give_up(serving, jobs)
        for task in tasks:
            task.cancel()


def sent(
    serving: Serving, jobs: Sequence[Job], chunks: AsyncIterator[dict[str, Any]]
) -> EventSourceResponse:
    """Puts rows into the queue; returns their stream, which a server's stop leaves alone for its grace."""
    serving.batcher.submit(jobs)
    return EventSourceResponse(
        events(serving, jobs, chunks),
        sep="\n",
        ping=15,
        send_timeout=30,
        shutdown_event=anyio.Event(),
        shutdown_grace_period=serving.limits.grace_seconds,
    )


async def _whole(serving: Serving, job: Job) -> GenerationResult:
    async for piece in job.pieces():
        if isinstance(piece, GenerationResult):
            count(serving, job, piece)
            return piece
    raise AssertionError("a row ends with its result")


def count(serving: Serving, job: Job, result: GenerationResult) -> None:
    """Counts an answer that has ended."""
    job.ended = True
    metrics = serving.metrics
    metrics.tokens.labels("prompt").inc(result.prompt_tokens)
    metrics.tokens.labels("completion").inc(result.completion_tokens)
    if job.first is not None:
        metrics.first.observe(job.first - job.arrived)
    metrics.seconds.observe(time.monotonic() - job.arrived)


def give_up(serving: Serving, jobs: Sequence[Job]) -> None:
    """Ends the rows that have not ended."""
    for job in jobs:
        if not job.ended and not job.cancel.is_set():
            job.cancel.set()
            serving.metrics.cancelled.inc()
