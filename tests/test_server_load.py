"""Many requests at once, some of them malformed, some of whose clients leave; and whatever a schema allows."""

import asyncio
import contextlib
import gc
import json
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from rc_agents.adapters.server import Limits, create_app

from rc_agents.service import GenerationParams, GenerationService
from tests.server_running import running
from tests.test_server import MODEL

pytestmark = pytest.mark.tiny
MODELS = {"rc:none": [], "rc:medical": ["medical"], "rc:medical+code": ["medical", "code"]}
ASKED = [
    (
        model,
        f"{place} {what}",
        size,
        ("text", "chat", "streamed chat", "sampled text")[len(place) % 4],
    )
    for model in MODELS
    for place in ("The river", "The town", "The hill", "The doctor")
    for what, size in (("is", 3), ("was seen by the people and", 7), ("came", 12))
]
MALFORMED = [b"{", b"[]", b'{"model": "rc"}', b'{"model": "rc", "prompt": 3}', b"\xff"]
CONCURRENT = 32


def request(model, prompt, size, kind):
    """A request's body, and where it goes."""
    body = {"model": model, "max_tokens": size}
    if "chat" in kind:
        body["messages"] = [{"role": "user", "content": prompt}]
        return body | {"stream": kind.startswith("streamed")}, "chat/completions"
    sampled = {"temperature": 1.3, "seed": size} if kind.startswith("sampled") else {}
    return body | {"prompt": prompt, **sampled}, "completions"


def text_of(response):
    """The text of an answer, streamed or whole."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        (choice,) = response.json()["choices"]
        return choice["text"] if "text" in choice else choice["message"]["content"]
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in lines)


def told(service, model, prompt, size, kind):
    """What the service itself answers."""
    sampled = {"temperature": 1.3, "seed": size} if kind.startswith("sampled") else {}
    params = GenerationParams(max_new_tokens=size, specialists=MODELS[model], **sampled)
    asked = [{"role": "user", "content": prompt}] if "chat" in kind else prompt
    return service.generate(asked, params).text


def resident():
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


async def load(url, number, expected):
    """Sends requests; returns what became of them, and memory in the middle and at the end."""
    draw = random.Random(0)
    kinds = ["leaves"] * (number // 10) + ["malformed"] * (number // 20)
    kinds += ["asks"] * (number - len(kinds))
    draw.shuffle(kinds)
    seen, memory, gate = Counter(), [], asyncio.Semaphore(CONCURRENT)
    limits = httpx.Limits(max_connections=CONCURRENT)

    async def one(client, place, kind):
        body, where = request(*ASKED[place % len(ASKED)])
        address = f"{url}/v1/{where}"
        async with gate:
            if kind == "malformed":
                response = await client.post(address, content=MALFORMED[place % len(MALFORMED)])
                seen["refused" if response.status_code == 400 else "wrong"] += 1
            elif kind == "leaves":
                long = body | {"max_tokens": 600, "stream": bool(place % 2)}
                if place % 2:
                    async with client.stream("POST", address, json=long) as response:
                        async for _ in response.aiter_lines():
                            break
                else:
                    with contextlib.suppress(httpx.ReadTimeout):
                        await client.post(address, json=long, timeout=0.3)
                seen["left"] += 1
            else:
                response = await client.post(address, json=body)
                while response.status_code == 429:
                    await asyncio.sleep(0.2)
                    response = await client.post(address, json=body)
                found = text_of(response) if response.status_code == 200 else None
                seen["right" if found == expected[place % len(ASKED)] else "wrong"] += 1
            if sum(seen.values()) in (number // 2, number):
                gc.collect()
                memory.append(resident())

    async with httpx.AsyncClient(timeout=250, limits=limits) as client:
        await asyncio.gather(*(one(client, place, kind) for place, kind in enumerate(kinds)))
    return seen, memory


@pytest.mark.parametrize(
    "number", [80, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_no_request_is_lost_or_answered_with_anothers_text(number):
    service = GenerationService(MODEL)
    expected = [told(service, *one) for one in ASKED]
    assert len(set(expected)) > 24
    with running(MODEL, limits=Limits(batch=8, queue=48)) as server:
        seen, memory = asyncio.run(load(server.url, number, expected))
        assert seen == {
            "right": number - number // 10 - number // 20,
            "left": number // 10,
            "refused": number // 20,
        }
        assert server.batcher.waiting == 0
        counted = server.app.state.serving.metrics.cancelled._value.get()
        assert counted <= number // 10
    print(f"{number} requests: {dict(seen)}, memory {[size >> 20 for size in memory]} MiB")
    assert memory[1] < memory[0] * 1.1 + (32 << 20)


APP = create_app(MODEL, limits=Limits(max_tokens=4, prompt_tokens=512, seconds=5.0))


@schemathesis.openapi.from_asgi("/openapi.json", APP).parametrize()
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_the_schema_allows_is_answered_as_it_says(case):
    # A schema cannot say which models are served, or what fits them: a valid request may still be refused.
    case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])
