"""The OpenAI-compatible server, asked by OpenAI's own SDK over loopback."""

import contextlib
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import BaseModel
from rc_agents.adapters.server import Limits, create_app
from rc_agents.adapters.server.errors import Refused
from rc_agents.adapters.server.turns import Turns

import rc_agents
from rc_agents import service
from rc_agents.cli.app import run
from rc_agents.errors import ConfigError
from rc_agents.service import GenerationParams, GenerationService
from tests.ensembles import talking
from tests.server_running import running
from tests.tiny import tiny
from tests.tiny_tokenizers import EOS, tiny_tokenizer

pytestmark = pytest.mark.tiny
ROOM = 2048
USER = [{"role": "user", "content": "Where is the river?"}]


MODEL = talking("medical", "code", room=ROOM)
SERVICE = GenerationService(MODEL)


@pytest.fixture(scope="module")
def server():
    with running(MODEL) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def ask(client, model="rc:medical", **options):
    chosen = {"messages": USER, "max_tokens": 8, **options}
    return client.chat.completions.create(model=model, **chosen)


def told(specialists=("medical",), **options):
    params = GenerationParams(**{"max_new_tokens": 8, "specialists": list(specialists), **options})
    return SERVICE.generate(USER, params)


@contextlib.contextmanager
def held(monkeypatch, server):
    """Keeps the one thread that answers from beginning, until the block ends."""
    go = threading.Event()
    advance = service.running.advance

    def wait(*args, **kwargs):
        go.wait(120)
        return advance(*args, **kwargs)

    monkeypatch.setattr(service.running, "advance", wait)
    try:
        yield go
    finally:
        go.set()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# Answers.


@pytest.mark.parametrize(
    ("model", "names"),
    [("rc:medical", ["medical"]), ("rc:medical+code", ["medical", "code"]), ("rc:none", [])],
)
def test_a_model_is_the_specialists_that_its_name_names(client, model, names):
    found = ask(client, model)
    expected = told(names)
    assert found.choices[0].message.content == expected.text
    assert found.model == model
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == 8
    assert client.models.retrieve(model).specialists == names


def test_models_are_listed(client):
    assert [one.id for one in client.models.list()] == ["rc", "rc:medical", "rc:code", "rc:none"]
    assert ask(client, "rc").choices[0].message.content == told(["medical", "code"]).text


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"temperature": 1.2, "seed": 5}, {"temperature": 1.2, "seed": 5}),
        (
            {"temperature": 1.0, "top_p": 0.7, "seed": 5},
            {"temperature": 1.0, "top_p": 0.7, "seed": 5},
        ),
        ({"stop": ["a", "e"]}, {"stop": ["a", "e"]}),
        ({"logit_bias": {"77": 100}}, {"logit_bias": {77: 100.0}}),
        ({"extra_body": {"strength": 0.5}}, {"strength": 0.5}),
        ({"max_completion_tokens": 3, "user": "me"}, {"max_new_tokens": 3}),
    ],
)
def test_choices_reach_the_service(client, options, params):
    assert ask(client, **options).choices[0].message.content == told(**params).text


def test_a_stream_adds_up_to_the_answer_and_ends_with_its_usage(client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    whole = ask(client)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len({one.id for one in chunks}) == 1
    assert len(chunks) > 4


def test_several_answers_of_one_request_have_seeds_of_their_own(client):
    found = ask(client, n=3, temperature=1.5, seed=7)
    expected = [told(temperature=1.5, seed=7 + place).text for place in range(3)]
    assert [one.message.content for one in found.choices] == expected
    assert found.usage.completion_tokens == 24
    chunks = list(ask(client, n=3, temperature=1.5, seed=7, stream=True))
    texts = ["", "", ""]
    for one in chunks:
        texts[one.choices[0].index] += one.choices[0].delta.content or ""
    assert texts == expected


def test_a_text_is_gone_on_from(client):
    made = client.completions.create
    params = GenerationParams(max_new_tokens=6, specialists=["medical"])
    texts = [SERVICE.generate(one, params).text for one in ("The river", "The town")]
    found = made(model="rc:medical", prompt=["The river", "The town"], max_tokens=6)
    assert [one.text for one in found.choices] == texts
    ids = SERVICE.encode("The river").token_ids
    assert made(model="rc:medical", prompt=list(ids), max_tokens=6).choices[0].text == texts[0]
    echoed = made(model="rc:medical", prompt="The river", max_tokens=6, echo=True)
    assert echoed.choices[0].text == "The river" + texts[0]
    chunks = made(model="rc:medical", prompt="The river", max_tokens=6, stream=True)
    assert "".join(one.choices[0].text for one in chunks) == texts[0]


def test_log_probabilities_are_the_models_own(client):
    found = client.completions.create(
        model="rc:medical", prompt="The river", max_tokens=3, echo=True, logprobs=2
    )
    kept = found.choices[0].logprobs
    ids = MODEL.tokenizer("The river", return_tensors="pt").input_ids
    text = MODEL.generate(ids, specialists=["medical"], max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        logprobs = MODEL(text, specialists=["medical"]).logits[0].log_softmax(-1)
    expected = [float(logprobs[n, token]) for n, token in enumerate(text[0, 1:])]
    assert kept.token_logprobs[0] is None
    assert kept.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert len(kept.tokens) == len(kept.text_offset) == text.shape[1]
    chat = ask(client, logprobs=True, top_logprobs=3, temperature=1.3, seed=1).choices[0].logprobs
    assert len(chat.content) == 8
    for one in chat.content:
        values = [top.logprob for top in one.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert one.logprob <= values[0]


def test_attribution_says_what_each_specialist_added(client):
    def shares(model, **more):
        body = {"attribution": True, **more}
        kept = ask(client, model, extra_body=body).choices[0].model_extra["attribution"]
        assert len(kept) == 8
        return [one["specialists"] for one in kept]

    both, one = shares("rc"), shares("rc:medical")
    assert all(row.keys() == {"medical", "code"} and min(row.values()) > 0 for row in both)
    assert all(row.keys() == {"medical"} for row in one)
    halved = shares("rc:medical", strength=0.5)
    assert halved[0]["medical"] < one[0]["medical"]
    assert shares("rc:none") == [{}] * 8


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Paris"]}},
            "required": ["city"],
        },
    },
}


def test_tools_are_called_and_their_results_read(client):
    asked = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 150}
    choice = ask(client, **asked).choices[0]
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Paris")
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    chunks = list(ask(client, stream=True, **asked))
    pieces = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ()]
    assert [one.function.arguments for one in pieces] == [call.function.arguments]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "dry"}
    turns = [*USER, choice.message.model_dump(exclude_none=True), result]
    assert ask(client, messages=turns, tools=[WEATHER]).usage.prompt_tokens > 200


class Place(BaseModel):
    city: Literal["Rome", "Paris"]


def test_an_answer_is_parsed_to_its_class(client):
    found = client.chat.completions.parse(
        model="rc:medical", messages=USER, response_format=Place, max_tokens=60
    )
    assert isinstance(found.choices[0].message.parsed, Place)


@pytest.mark.parametrize("stream", [False, True])
def test_with_tools_and_a_form_an_answer_is_a_call_or_of_that_form(client, stream):
    named = {"name": "place", "schema": Place.model_json_schema(), "strict": True}
    form = {"type": "json_schema", "json_schema": named}
    asked = {"tools": [WEATHER], "response_format": form, "max_tokens": 150, "stream": stream}
    found = {}
    for first in ("{", "<"):
        (token,) = MODEL.tokenizer(first, add_special_tokens=False).input_ids
        said = ask(client, logit_bias={str(token): 100}, **asked)
        if stream:
            parts = [one.choices[0] for one in said]
            text = "".join(one.delta.content or "" for one in parts)
            calls = [call for one in parts for call in one.delta.tool_calls or ()]
            found[first] = (parts[-1].finish_reason, text, calls)
        else:
            (one,) = said.choices
            found[first] = (one.finish_reason, one.message.content, one.message.tool_calls or [])
    reason, text, calls = found["{"]
    assert (reason, calls) == ("stop", [])
    assert Place.model_validate_json(text)
    reason, text, (call,) = found["<"]
    assert (reason, text or "") == ("tool_calls", "")
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Paris")


def test_a_seed_gives_the_same_answer_whatever_else_is_in_flight(client):
    asked = [
        {"model": model, "seed": seed, "temperature": 1.4, "max_tokens": 4 + seed}
        for seed in range(5)
        for model in ("rc:none", "rc:medical", "rc:medical+code", "rc")
    ]
    alone = [ask(client, **one).choices[0].message.content for one in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: ask(client, **one).choices[0].message.content, asked))
    assert together == alone
    assert len(set(alone)) > 12


BOTH = pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "by call"])


@pytest.fixture(scope="module")
def by_call():
    with running(MODEL, limits=Limits(continuous=False)) as found:
        yield found


@BOTH
def test_requests_that_wait_join_those_that_run(server, by_call, monkeypatch, continuous):
    sizes, server = [], server if continuous else by_call
    monkeypatch.setattr(server.batcher, "_observe", sizes.append)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with client, held(monkeypatch, server) as go, ThreadPoolExecutor(7) as pool:
        first = pool.submit(ask, client)
        until(lambda: sizes == [1])
        others = [pool.submit(ask, client, max_tokens=2 + n) for n in range(6)]
        until(lambda: server.batcher.waiting == 6)
        go.set()
        assert [len(one.result().choices) for one in [first, *others]] == [1] * 7
    assert sizes == ([1, 7] if continuous else [1, 6])


@BOTH
def test_those_who_ask_take_turns(monkeypatch, continuous):
    """Six requests of one user are there when another's two come: one is begun for each of them."""
    begun, begin = [], service.running.begin

    def noted(model, rows, calls):
        begun.extend(row.limit for row in rows)
        return begin(model, rows, calls)

    monkeypatch.setattr(service.running, "begin", noted)
    limits = Limits(batch=1, continuous=continuous)
    with (
        running(MODEL, limits=limits) as server,
        held(monkeypatch, server) as go,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = []
        for size in range(1, 9):
            user = "many" if size < 7 else "few"
            answers.append(pool.submit(ask, api, user=user, max_tokens=size))
            until(lambda: server.batcher.running + server.batcher.waiting == len(answers))
        go.set()
        assert all(one.result().choices for one in answers)
    assert begun == [1, 2, 7, 3, 8, 4, 5, 6]


def test_turns_starve_nobody_and_cost_nothing_where_nothing_was_begun():
    turns, waiting = Turns(), []

    def ask(who):
        waiting.append((who, turns.give(who, waiting)))

    def begin():
        waiting.sort(key=lambda one: one[1])
        turns.begin(waiting[0][1])
        return waiting.pop(0)[0]

    for who in "aaab":
        ask(who)
    assert [begin() for _ in range(4)] == ["a", "b", "a", "a"]
    ask("a")
    for number in range(9):  # a newcomer for every row that is begun
        ask(f"new {number}")
        if begin() == "a":
            break
    assert number == 0
    waiting.clear()
    for _ in range(60):
        ask("left")
    waiting.clear()  # they were cancelled
    ask("b")
    ask("left")
    ask("b")
    assert [begin() for _ in range(3)] == ["b", "left", "b"]


def test_a_short_answer_does_not_wait_for_a_long_one(client, server, monkeypatch):
    with held(monkeypatch, server) as go, ThreadPoolExecutor(3) as pool:
        pool.submit(ask, client, max_tokens=1)
        until(lambda: server.batcher.running == 1)
        long = pool.submit(ask, client, max_tokens=160, logit_bias={str(EOS): -100})
        short = pool.submit(ask, client, max_tokens=2)
        until(lambda: server.batcher.waiting == 2)
        go.set()
        assert short.result().usage.completion_tokens == 2
        assert not long.done()
        assert long.result().usage.completion_tokens == 160


# Refusals.


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": "rc:legal"}, openai.NotFoundError, "known: rc, rc:medical"),
        ({"model": "gpt-4"}, openai.NotFoundError, "not served here"),
        ({"messages": []}, openai.BadRequestError, "at least 1 item"),
        ({"messages": [{"role": "user"}]}, openai.BadRequestError, "^.*message"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens is at most 4096"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"n": 9}, openai.BadRequestError, "n is at most 8"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"frequency_penalty": 1}, openai.BadRequestError, "frequency_penalty is not supported"),
        ({"logit_bias": {"a": 1}}, openai.BadRequestError, "token ids as keys"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "ids end at"),
        ({"extra_body": {"tempe": 1}}, openai.BadRequestError, "tempe: Extra inputs"),
        ({"extra_body": {"strength": {"legal": 1}}}, openai.BadRequestError, "legal"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "a tool is"),
        ({"tool_choice": "required"}, openai.BadRequestError, "there are no tools"),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError, "response_format"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            openai.BadRequestError,
            "nothing is fetched from elsewhere",
        ),
        (
            {"messages": [{"role": "user", "content": "the " * 3000}]},
            openai.BadRequestError,
            "at most 2048",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_in_openais_form(client, options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        ask(client, **options)
    assert caught.value.body["type"] in ("invalid_request_error", "not_found_error")


def test_a_prompt_is_measured_in_each_models_own_tokens():
    own, other = tiny_tokenizer("prose"), tiny_tokenizer("code")
    model = rc_agents.couple(
        tiny("llama", vocab_size=len(own)),
        {"far": tiny("llama", vocab_size=len(other), seed=1)},
        tokenizers={"anchor": own, "far": other},
        bridge={"start": "default", "gate": "fixed"},
    )
    model.models["anchor"].config.max_position_embeddings = ROOM
    text = "The doctor said that the patient had a fever. " * 8
    size = len(other(text).input_ids)
    assert len(own(text).input_ids) < 256 < size
    with running(model) as server:
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match=rf"{size} tokens for model 'far'.*256"):
            api.completions.create(model="rc", prompt=text, max_tokens=2)
        assert api.completions.create(model="rc:none", prompt=text, max_tokens=2).choices
        api.close()


def test_a_model_that_takes_no_part_has_no_say_about_the_length(client, monkeypatch):
    monkeypatch.setattr(MODEL.models["code"].config, "max_position_embeddings", 64)
    asked = {"max_tokens": 60, "temperature": 1.0, "seed": 1}
    with pytest.raises(openai.BadRequestError, match="model 'code' takes at most 64"):
        ask(client, "rc", **asked)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda n: ask(client, "rc:medical", **asked | {"seed": n}), range(3)))
        short = pool.submit(ask, client, "rc:code", max_tokens=4)
    expected = [told(max_new_tokens=60, temperature=1.0, seed=n).text for n in range(3)]
    assert [one.choices[0].message.content for one in found] == expected
    assert short.result().usage.completion_tokens == 4


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": "a\ud800"},
        {"prompt": "a", "logit_bias": {"1" * 5000: 1}},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "stream": True, "echo": True, "logprobs": 1},
    ],
)
def test_an_odd_completion_is_a_clients_error(server, body):
    content = json.dumps({"model": "rc"} | body)
    response = httpx.post(f"{server.url}/v1/completions", content=content)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_nulls_are_as_if_left_out(server):
    body = {"model": "rc", "prompt": "a", "max_tokens": 2, "stream": None, "echo": None}
    response = httpx.post(f"{server.url}/v1/completions", json=body | {"logprobs": None})
    assert response.status_code == 200
    chat = {"model": "rc", "messages": USER, "max_tokens": 2, "logprobs": None, "tools": None}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=chat).status_code == 200


def test_a_prompts_own_probabilities_need_no_answer(client):
    options = {"model": "rc", "prompt": "The river came", "echo": True, "logprobs": 0}
    found = client.completions.create(max_tokens=0, **options)
    assert found.choices[0].text == "The river came"
    assert found.usage.completion_tokens == 0
    more = client.completions.create(max_tokens=2, **options).choices[0].logprobs
    assert found.choices[0].logprobs.token_logprobs == more.token_logprobs[:-2]


def test_the_servers_limit_holds_where_a_request_says_nothing():
    with running(MODEL, limits=Limits(max_tokens=4)) as server:
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        chat = api.chat.completions.create(model="rc", messages=USER)
        text = api.completions.create(model="rc", prompt="The river")
        assert chat.usage.completion_tokens == text.usage.completion_tokens == 4
        api.close()


@pytest.mark.parametrize("options", [{"name": "a:b"}, {"name": ""}, {"api_key": " "}])
def test_names_and_keys_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigError):
        create_app(MODEL, **options)


def test_what_is_no_request_has_openais_form_too(server):
    post = f"{server.url}/v1/chat/completions"
    for response, status in [
        (httpx.get(f"{server.url}/v2/nothing"), 404),
        (httpx.get(post), 405),
        (httpx.post(post, content=b"{"), 400),
        (httpx.post(post, content=b"\xff\xfe"), 400),
        (httpx.post(f"{server.url}/v1/embeddings", json={"input": "a"}), 400),
        (httpx.post(post, content=b" " * (1 << 21)), 413),
        (httpx.post(post, content=iter([b" " * (1 << 20)] * 2)), 413),
    ]:
        assert response.status_code == status
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_key_is_asked_for_where_there_is_one():
    with running(MODEL, api_key="secret") as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/").status_code == 200
        for key in ("", "Bearer", "Bearer wrong", "Basic secret", "Bearer secret2"):
            refused = httpx.get(f"{server.url}/v1/models", headers={"Authorization": key})
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret")
        assert ask(api).choices
        api.close()


def test_beyond_loopback_the_command_wants_a_key(capsys, monkeypatch):
    monkeypatch.delenv("RC_AGENTS_API_KEY", raising=False)
    assert run(["serve", "nothing", "--host", "0.0.0.0"]) == 2
    assert "set RC_AGENTS_API_KEY" in capsys.readouterr().err
    assert run(["serve", "nothing"]) == 2  # it gets as far as the model
    assert "nothing" in capsys.readouterr().err


# The queue, deadlines, and clients that leave.


def test_requests_that_are_being_read_hold_room_in_the_queue():
    with running(MODEL, limits=Limits(batch=1, queue=3)) as server:
        place = server.batcher.place
        full = pytest.raises(Refused, match="3 answers wait, 1 of them yours")
        with place("a", 1), place("b", 2), full, place("a", 1):
            pass
        with place("a", 3), pytest.raises(Refused), place("b", 1):
            pass
        with place("b", 1):
            pass


def test_a_full_queue_says_when_to_come_back(monkeypatch):
    limits = Limits(batch=1, queue=2)
    with running(MODEL, limits=limits) as server, held(monkeypatch, server) as go:
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(3) as pool:
            one = pool.submit(ask, api)
            until(lambda: server.batcher.running == 1)
            others = [pool.submit(ask, api) for _ in range(2)]
            until(lambda: server.batcher.waiting == 2)
            unread = [{"role": "user", "content": [{"type": "image", "image": 1}]}]
            for messages in (None, unread):  # what a message shows is not looked at
                with pytest.raises(openai.RateLimitError, match="2 answers wait") as caught:
                    ask(api, **({} if messages is None else {"messages": messages}))
            assert int(caught.value.response.headers["retry-after"]) >= 1
            go.set()
            assert all(one.result().choices for one in [one, *others])
        api.close()


def test_one_who_asks_leaves_room_in_the_queue_for_others(monkeypatch):
    limits = Limits(batch=1, queue=8)
    with running(MODEL, limits=limits) as server, held(monkeypatch, server) as go:
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with api, ThreadPoolExecutor(9) as pool:
            asked = [pool.submit(ask, api, user="many") for _ in range(8)]
            until(lambda: server.batcher.running + server.batcher.waiting == 8)
            with pytest.raises(
                openai.RateLimitError, match=r"7 of them yours, .* 7 of them for one"
            ):
                ask(api, user="many")
            asked.append(pool.submit(ask, api, user="few"))
            until(lambda: server.batcher.waiting == 8)
            with pytest.raises(openai.RateLimitError, match="8 answers wait, 1 of them yours"):
                ask(api, user="few")
            go.set()
            assert all(one.result().choices for one in asked)


def test_a_deadline_ends_what_runs_and_refuses_what_waits(client, server, monkeypatch):
    endless = {"max_tokens": 1500, "logit_bias": {str(EOS): -100}}
    found = ask(client, **endless, extra_body={"timeout": 0.4})
    assert 0 < found.usage.completion_tokens < 1500
    assert found.choices[0].finish_reason == "length"
    with held(monkeypatch, server) as go, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client)
        until(lambda: server.batcher.running == 1)
        late = pool.submit(ask, client, extra_body={"timeout": 0.05})
        with pytest.raises(openai.InternalServerError, match="deadline passed"):
            late.result(5)  # while the other still runs
        assert not first.done()
        go.set()
        assert first.result().choices


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_frees_its_place(server, client, streaming):
    gone = server.app.state.serving.metrics.cancelled
    before = gone._value.get()
    endless = {"max_tokens": 1800, "logit_bias": {str(EOS): -100}}
    body = {"model": "rc", "messages": USER, "stream": streaming, **endless}
    url = f"{server.url}/v1/chat/completions"
    if streaming:
        with httpx.stream("POST", url, json=body, timeout=20) as response:
            lines = response.iter_lines()  # kept: httpx closes the connection with its iterator
            next(lines)
            until(lambda: server.batcher.running == 1)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.7)
    began = time.monotonic()
    until(lambda: gone._value.get() > before and server.batcher.running == 0)
    assert ask(client).usage.completion_tokens == 8
    assert time.monotonic() - began < 15  # 1,800 tokens take far longer


@pytest.mark.parametrize("streaming", [True, False])
def test_a_stop_lets_running_answers_end_and_fails_those_that_wait(monkeypatch, streaming):
    limits = Limits(batch=1, grace_seconds=15)
    with running(MODEL, limits=limits) as server, ThreadPoolExecutor(3) as pool:
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        def whole():
            found = ask(api, stream=streaming, max_tokens=20)
            return (list(found)[-1] if streaming else found).choices[0].finish_reason

        with held(monkeypatch, server) as go:
            runs = pool.submit(whole)
            until(lambda: server.batcher.running == 1)
            waits = pool.submit(whole)
            until(lambda: server.batcher.waiting == 1)
            server.server.should_exit = True  # as a signal's handler sets it
            with pytest.raises(openai.APIError, match="before this request was begun"):
                waits.result(10)
            go.set()
            assert runs.result() == "length"
        api.close()


def test_a_stop_cuts_what_outlasts_its_grace_and_says_so():
    with running(MODEL, limits=Limits(grace_seconds=0.5)) as server, ThreadPoolExecutor(1) as pool:
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        runs = pool.submit(ask, api, max_tokens=1900, logit_bias={str(EOS): -100})
        until(lambda: server.batcher.running == 1)
        server.server.should_exit = True
        with pytest.raises(openai.InternalServerError, match="while this request ran"):
            runs.result(20)
        server.thread.join(20)
        assert not server.thread.is_alive()
        api.close()


def test_an_app_can_be_started_again():
    app = create_app(MODEL)
    for _ in range(2):
        with TestClient(app) as found:
            body = {"model": "rc", "prompt": "The", "max_tokens": 2}
            assert found.post("/v1/completions", json=body).status_code == 200
            assert found.get("/health").json()["joins_at"] == "token"


def test_where_caches_cannot_be_joined_the_server_says_so(caplog):
    static = rc_agents.couple(tiny("llama"), {}, tokenizers={"anchor": tiny_tokenizer("prose")})
    static.generation_config.cache_implementation = "static"
    with TestClient(create_app(static)) as found:
        told = found.get("/health").json()
    why = "the generation config asks for static cache"
    assert (told["joins_at"], told["why"]) == ("call", why)
    caplog.set_level(logging.INFO, logger="rc_agents.server")
    with TestClient(create_app(MODEL, limits=Limits(continuous=False))) as found:
        assert found.get("/health").json()["why"] == "continuous batching is off"
    assert "answers join others by call: continuous batching is off" in caplog.text


def test_a_row_that_no_longer_fits_fails_alone_and_the_server_goes_on(client, server, monkeypatch):
    with held(monkeypatch, server) as go, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client)
        until(lambda: server.batcher.running == 1)
        late = pool.submit(ask, client, "rc:code")
        until(lambda: server.batcher.waiting == 1)
        monkeypatch.setattr(MODEL.models["code"].config, "max_position_embeddings", 4)
        go.set()
        assert first.result().choices
        with pytest.raises(openai.BadRequestError, match="takes at most 4"):
            late.result(10)
    assert ask(client).choices
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_clients_that_left_take_no_place_in_the_queue(monkeypatch):
    with running(MODEL, limits=Limits(batch=1, queue=4)) as server:
        with held(monkeypatch, server):
            body = {"model": "rc", "messages": USER, "max_tokens": 4}
            url = f"{server.url}/v1/chat/completions"
            for number in range(6):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(url, json=body, timeout=0.3)
                until(lambda: server.batcher.waiting == 0)
                assert len(server.batcher._waiting) <= 2, number
        assert httpx.post(url, json=body, timeout=30).status_code == 200


@BOTH
def test_one_request_at_fault_fails_alone(server, by_call, monkeypatch, continuous):
    advance, server = service.running.advance, server if continuous else by_call

    def fails(model, rows, *args):
        if any(one.row.limit == 3 for one in rows):
            raise RuntimeError("inside")
        return advance(model, rows, *args)

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with client, held(monkeypatch, server) as go, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, client)
        until(lambda: server.batcher.running == 1)
        others = [pool.submit(ask, client, max_tokens=size) for size in (2, 3, 4)]
        until(lambda: server.batcher.waiting == 3)
        monkeypatch.setattr(service.running, "advance", fails)
        go.set()
        sizes = [one.result().usage.completion_tokens for one in (first, others[0], others[2])]
        assert sizes == [8, 2, 4]
        with pytest.raises(openai.InternalServerError, match="failed: RuntimeError"):
            others[1].result()


def test_logs_and_metrics_tell_no_prompts(client, server, caplog):
    with caplog.at_level(logging.DEBUG, logger="uvicorn"):
        ask(client, messages=[{"role": "user", "content": "very private words"}])
    assert "private" not in caplog.text
    text = httpx.get(f"{server.url}/metrics").text
    assert "private" not in text
    assert 'rc_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "rc_batch_rows_bucket" in text


def test_limits_are_numbers_above_zero():
    with pytest.raises(ConfigError, match="the limit batch is above 0"):
        Limits(batch=0)
