"""The LangChain adapters: the upstream suite unmodified, and what it does not ask."""

import asyncio
import json
import pickle
import re
import subprocess
import sys
import threading
import time
from functools import lru_cache, reduce
from operator import add
from typing import Any, Literal

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import BaseModel
from rc_agents.adapters.langchain import ChatCoupled, CoupledLLM

import rc_agents
from rc_agents.errors import InputError
from rc_agents.service import GenerationParams, GenerationService, guides
from tests.ensembles import talking
from tests.tiny import saved

pytestmark = pytest.mark.tiny
ROOM = 2048


MODEL = talking("medical", room=ROOM)
SERVICE = GenerationService(MODEL)


class TestUnit(ChatModelUnitTests):
    """The upstream unit suite, on a live tiny ensemble."""

    @property
    def chat_model_class(self) -> type[ChatCoupled]:
        return ChatCoupled

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL}

    @property
    def supports_model_override(self) -> bool:
        return False


@pytest.fixture(params=[ChatCoupled, CoupledLLM])
def adapter(request):
    return request.param


def chat(**fields):
    return ChatCoupled(model=MODEL, **{"max_tokens": 8, **fields})


def llm(**fields):
    return CoupledLLM(model=MODEL, **{"max_tokens": 8, **fields})


def turn(text, **chosen):
    """What the service answers."""
    params = GenerationParams(**{"max_new_tokens": 8, **chosen})
    return SERVICE.generate([{"role": "user", "content": text}], params)


# Answers.


def test_a_chat_answers_as_the_service_does():
    answer = chat().invoke("Where?")
    expected = turn("Where?")
    assert answer.content == expected.text
    assert answer.usage_metadata == {
        "input_tokens": expected.prompt_tokens,
        "output_tokens": 8,
        "total_tokens": expected.prompt_tokens + 8,
    }
    assert answer.response_metadata == {
        "model_name": "live:anchor+medical",
        "model_provider": "rc_agents",
        "finish_reason": "length",
    }


def test_roles_become_those_of_the_template():
    messages = [SystemMessage("Be kind."), HumanMessage("a"), AIMessage("b"), HumanMessage("c")]
    roles = ["system", "user", "assistant", "user"]
    chat_dicts = [{"role": r, "content": m.content} for r, m in zip(roles, messages, strict=True)]
    expected = SERVICE.generate(chat_dicts, GenerationParams(max_new_tokens=8))
    assert chat().invoke(messages).content == expected.text
    blocks = [HumanMessage([{"type": "text", "text": "Whe"}, "re?"])]
    assert chat().invoke(blocks).content == turn("Where?").text


@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.8, "seed": 3},
        {"specialists": []},
        {"strength": 0.5},
        {"strength": {"medical": 2.0}},
        {"stop": ["a"]},
    ],
)
def test_choices_as_fields_arguments_and_bound(chosen):
    expected = turn("Where?", **chosen).text
    assert chat(**chosen).invoke("Where?").content == expected
    assert chat().invoke("Where?", **chosen).content == expected
    assert chat().bind(**chosen).invoke("Where?").content == expected
    plain = SERVICE.generate("Where", GenerationParams(max_new_tokens=8, **chosen)).text
    assert llm(**chosen).invoke("Where") == llm().invoke("Where", **chosen) == plain


def test_configurable_fields_share_the_loaded_ensemble(tmp_path):
    path = saved(tmp_path, "llama", "prose")
    lazy = ChatCoupled(model=str(path), max_tokens=4)
    field = ConfigurableField(id="temperature")
    model = lazy.configurable_fields(temperature=field)
    first = model.with_config(configurable={"temperature": 0.5}).invoke("Hi", seed=1)
    service = lazy.source.get()
    assert first.content == lazy.invoke("Hi", temperature=0.5, seed=1).content
    assert lazy.source.get() is service
    assert lazy.model_copy(update={"seed": 2}).source.get() is service


def test_a_stream_adds_up_to_the_answer():
    chunks = list(chat().stream("Where?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    answer = chat().invoke("Where?")
    assert (whole.content, whole.usage_metadata) == (answer.content, answer.usage_metadata)
    assert whole.response_metadata == answer.response_metadata
    assert chunks[-1].chunk_position == "last"
    assert len(chunks) > 3
    assert "".join(llm().stream("Where")) == llm().invoke("Where")


def test_leaving_a_stream_stops_the_generation():
    before = threading.active_count()
    for model in (chat(max_tokens=200), llm(max_tokens=200)):
        stream = model.stream("Where?")
        next(stream)
        stream.close()
        assert threading.active_count() == before


# Batches.


@pytest.fixture
def calls(monkeypatch):
    """The batch sizes of all `generate` calls."""
    found = []
    generate = type(MODEL).generate

    def counting(self, **kwargs):
        found.append(kwargs["input_ids"].shape[0])
        return generate(self, **kwargs)

    monkeypatch.setattr(type(MODEL), "generate", counting)
    return found


INPUTS = [f"Question {n}?" for n in range(9)]


@pytest.mark.parametrize("chosen", [{}, {"temperature": 1.0, "seed": 5}])
def test_a_batch_is_one_call_and_equals_its_singles(calls, chosen):
    expected = [chat(**chosen).invoke(one).content for one in INPUTS]
    plain = [llm(**chosen).invoke(one) for one in INPUTS]
    calls.clear()
    assert [one.content for one in chat(**chosen).batch(INPUTS)] == expected
    assert [one.content for one in asyncio.run(chat(**chosen).abatch(INPUTS))] == expected
    assert llm(**chosen).batch(INPUTS) == plain
    assert calls == [9, 9, 9]
    prompt = ChatPromptTemplate.from_messages([("user", "{text}")])
    rows = (prompt | chat(**chosen)).batch([{"text": one} for one in INPUTS])
    assert [one.content for one in rows] == expected
    assert calls[3:] == [9]


def test_max_concurrency_bounds_the_rows(calls):
    chat().batch(INPUTS, {"max_concurrency": 4})
    llm().batch(INPUTS, {"max_concurrency": 4})
    assert calls == [4, 4, 1, 4, 4, 1]


def test_equal_inputs_draw_samples_of_their_own(calls):
    answers = {one.content for one in chat(temperature=1.0).batch(["Same?"] * 6)}
    assert len(answers) > 1
    assert calls == [6]


def test_an_input_that_cannot_run_fails_alone():
    inputs = ["a", [HumanMessage([{"type": "image", "url": "x"}])], "word " * ROOM, "b"]
    answers = chat().batch(inputs, return_exceptions=True)
    assert [answers[n].content for n in (0, 3)] == [turn("a").text, turn("b").text]
    assert all(isinstance(answers[n], InputError) for n in (1, 2))
    with pytest.raises(InputError):
        chat().batch(inputs)
    assert chat().batch([]) == []


class Recorder(BaseCallbackHandler):
    def __init__(self):
        self.starts, self.ends, self.tokens = 0, [], []

    def on_chat_model_start(self, *args, **kwargs):
        self.starts += 1

    def on_llm_start(self, *args, **kwargs):
        self.starts += 1

    def on_llm_new_token(self, token, **kwargs):
        self.tokens.append(token)

    def on_llm_end(self, response, **kwargs):
        self.ends.append(response.generations[0][0].text)


@pytest.mark.parametrize("make", [chat, llm])
def test_callbacks_see_every_input_and_token(make):
    recorder = Recorder()
    answers = make().batch(["a", "b", "c"], {"callbacks": [recorder]})
    assert recorder.starts == 3
    assert sorted(recorder.ends) == sorted(getattr(one, "content", one) for one in answers)
    recorder = Recorder()
    list(make().stream("a", {"callbacks": [recorder]}))
    assert "".join(recorder.tokens) == recorder.ends[0]


# Async.


@pytest.mark.parametrize("make", [chat, llm])
def test_async_calls_leave_the_event_loop_free(make, monkeypatch):
    forward = MODEL.forward
    monkeypatch.setattr(
        MODEL, "forward", lambda *a, **kw: (time.sleep(0.02), forward(*a, **kw))[1], raising=False
    )

    async def run(work):
        ticks = 0
        task = asyncio.create_task(work)
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        return await task, ticks

    async def collect():
        return [getattr(one, "content", one) async for one in make().astream("Hi")]

    answer, ticks = asyncio.run(run(make().ainvoke("Hi")))
    assert ticks > 8
    pieces, ticks = asyncio.run(run(collect()))
    assert ticks > 8
    assert "".join(pieces) == getattr(answer, "content", answer)


def test_async_calls_hold_the_callers_context():
    async def run():
        with MODEL.disabled():
            return await chat().ainvoke("Where?")

    assert asyncio.run(run()).content == turn("Where?", specialists=[]).text


def test_leaving_an_async_stream_stops_the_generation():
    async def run():
        stream = chat(max_tokens=200).astream("Where?")
        await anext(stream)
        await stream.aclose()

    before = threading.active_count()
    asyncio.run(run())
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    names = [thread.name for thread in threading.enumerate()]
    assert "rc_agents-stream" not in names


@pytest.mark.parametrize("way", ["ainvoke", "abatch"])
async def test_a_cancelled_call_frees_the_model(way, monkeypatch):
    passes, forward = [], MODEL.forward

    def slow(*args, **kwargs):
        passes.append(time.sleep(0.02))
        return forward(*args, **kwargs)

    monkeypatch.setattr(MODEL, "forward", slow, raising=False)
    model = chat(max_tokens=150)
    task = asyncio.ensure_future(model.ainvoke("a") if way == "ainvoke" else model.abatch(INPUTS))
    while len(passes) < 2 and not task.done():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    done = len(passes)
    await asyncio.sleep(0.3)
    assert done <= len(passes) <= done + 2


# Loading, writing out, caching.


def test_nothing_is_loaded_before_the_first_call(adapter, tmp_path):
    model = adapter(model=str(tmp_path / "nothing"))
    with pytest.raises(rc_agents.RCError, match="nothing"):
        model.invoke("Hi")
    with pytest.raises(rc_agents.RCError, match="nothing"):
        adapter.from_pretrained(tmp_path / "nothing")


def test_an_ensemble_or_a_single_model_loads_by_name(adapter, tmp_path):
    base = saved(tmp_path, "llama", "prose")
    rc_agents.couple(str(base), {"medical": str(base)}).save_pretrained(tmp_path / "both")
    single = adapter.from_pretrained(base, max_tokens=3)
    both = adapter(model=tmp_path / "both", max_tokens=3, dtype="float32")
    assert both.source.get().model.specialists == ["medical"]
    answers = [getattr(one.invoke("Hi"), "content", None) for one in (single, both)]
    assert answers[0] == answers[1]  # untrained bridges
    assert single._identifying_params == {"model_name": str(base), "max_tokens": 3}


def test_an_adapter_goes_to_another_process_by_its_fields(adapter, tmp_path):
    path = saved(tmp_path, "llama", "prose")
    model = adapter(model=str(path), max_tokens=3, strength={"medical": 0.5}, specialists=[])
    model.source.get()
    back = pickle.loads(pickle.dumps(model))
    again = adapter(**model.model_dump(exclude_none=True))
    assert back._identifying_params == again._identifying_params == model._identifying_params
    assert back.source._service is None
    assert "source" not in repr(model)


def test_what_langchain_writes_out(tmp_path):
    """Upstream's suite has a chat model load from LangChain's own table of classes, so that one is not written out."""
    chosen = {"device_map": {"anchor": torch.device("cpu")}, "dtype": torch.bfloat16}
    written = json.loads(dumps(CoupledLLM(model="some/model", **chosen)))
    assert written["kwargs"] == {
        "model": "some/model",
        "device_map": {"anchor": "cpu"},
        "dtype": "bfloat16",
    }
    path = saved(tmp_path, "llama", "prose")
    model = CoupledLLM(model=path, **chosen).source.get().model
    assert model.models["anchor"].dtype == torch.bfloat16
    assert json.loads(dumps(chat()))["type"] == "not_implemented"


def test_a_live_ensemble_that_is_gone_says_so(adapter):
    back = pickle.loads(pickle.dumps(adapter(model=MODEL)))
    with pytest.raises(InputError, match="save it with save_pretrained and pass its path"):
        back.invoke("Hi")


def test_a_live_ensemble_is_not_answered_from_a_cache():
    from langchain_core.globals import set_llm_cache

    cache = InMemoryCache()
    set_llm_cache(cache)
    try:
        chat().invoke("Where?")
        assert not cache._cache
        assert chat(cache=cache).invoke("Where?").content == turn("Where?").text
        assert cache._cache
    finally:
        set_llm_cache(None)


@tool
def weather(city: Literal["Rome", "Paris"]) -> str:
    """Tells the weather."""
    return f"dry in {city}"


# Refusals.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: llm().invoke(""), "a prompt is a text of at least one character"),
        (lambda: chat().invoke("Hi", tools=[{}]), "a tool is"),
        (lambda: chat().bind_tools([weather], tool_choice="wether"), "tool_choice is"),
        (lambda: llm().invoke("Hi", tools=[]), "unknown argument 'tools'"),
        (lambda: chat().invoke("Hi", response_format={"type": "json"}), "response_format is"),
        (lambda: chat().with_structured_output(None), "needs a schema"),
        (lambda: chat().with_structured_output({}, method="xml"), "method is json_schema"),
        (lambda: chat().invoke("Hi", temprature=1), "did you mean 'temperature'?"),
        (lambda: chat().invoke("Hi", specialists=["legal"]), "unknown specialist 'legal'"),
        (lambda: chat().invoke("Hi", model="other"), "this object answers with"),
        (lambda: chat(temperature=-1), "temperature is a finite number"),
        (
            lambda: chat().invoke([HumanMessage([{"type": "image", "url": "x"}])]),
            "nothing is fetched from elsewhere",
        ),
        (lambda: ChatCoupled(model=3), "model is a saved ensemble's folder or id"),
        (lambda: ChatCoupled(model="x", temprature=1), "temprature"),
    ],
)
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_arguments_for_tools_that_ask_for_none_are_fine():
    assert chat().invoke("Hi", tools=[], tool_choice=None).content == turn("Hi").text


def test_a_call_is_a_message_that_a_tool_takes():
    model = chat(max_tokens=150).bind_tools([weather], tool_choice="any")
    message = model.invoke("Rome?")
    (call,) = message.tool_calls
    assert call["name"] == "weather"
    assert message.content == ""
    assert message.response_metadata["finish_reason"] == "tool_calls"
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert result.content == f"dry in {call['args']['city']}"
    streamed = reduce(add, model.stream("Rome?"))
    assert [one["args"] for one in streamed.tool_calls] == [call["args"]]
    assert streamed.usage_metadata == message.usage_metadata
    batch = model.batch(["Rome?", "Paris?"])
    assert [len(one.tool_calls) for one in batch] == [1, 1]
    again = chat(max_tokens=4).bind_tools([weather])
    assert (
        again.invoke([HumanMessage("Rome?"), message, result]).usage_metadata["input_tokens"] > 200
    )


def test_arguments_that_are_cut_are_an_invalid_call():
    message = chat(max_tokens=36).bind_tools([weather], tool_choice="weather").invoke("Rome?")
    assert message.tool_calls == []
    assert message.invalid_tool_calls[0]["name"] == "weather"
    assert message.response_metadata["finish_reason"] == "length"


class Place(BaseModel):
    """A place."""

    city: Literal["Rome", "Paris"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_of_its_class(method):
    model = chat(max_tokens=150)
    found = model.with_structured_output(Place, method=method).invoke("Where?")
    assert isinstance(found, Place)
    schema = {"title": "Place", "description": "A place", **Place.model_json_schema()}
    assert (
        model.with_structured_output(schema, method=method).invoke("Where?") == found.model_dump()
    )
    raw = model.with_structured_output(Place, method=method, include_raw=True).invoke("Where?")
    assert (raw["parsed"], raw["parsing_error"]) == (found, None)
    short = chat(max_tokens=2).with_structured_output(Place, method=method, include_raw=True)
    assert short.invoke("Where?")["parsed"] is None


def test_a_batch_compiles_its_schema_once(monkeypatch):
    compiled, compile_schema = [], guides._compiled.__wrapped__

    def counting(schema):
        compiled.append(schema)
        return compile_schema(schema)

    monkeypatch.setattr(guides, "_compiled", lru_cache(guides.KEPT)(counting))
    model = chat(max_tokens=150).with_structured_output(Place)
    assert all(isinstance(one, Place) for one in model.batch(["Where?", "And?", "When?"]))
    assert len(compiled) == 1


def test_json_mode_is_an_object():
    found = chat(max_tokens=30).bind(response_format={"type": "json_object"}).invoke("Where?")
    assert found.content.startswith("{")
    message = chat(max_tokens=30).with_structured_output(method="json_mode", include_raw=True)
    assert message.invoke("Where?")["raw"].content == found.content


def test_tokens_are_counted_by_the_anchors_tokenizer():
    tokens = SERVICE.model.tokenizer("the water")["input_ids"]
    assert chat().get_token_ids("the water") == tokens
    assert chat().get_num_tokens("") == 0
    rendered = SERVICE.render([{"role": "user", "content": "Hi"}])
    assert chat().get_num_tokens_from_messages([HumanMessage("Hi")]) == len(rendered.token_ids)


@pytest.mark.slow
def test_without_langchain_one_line_says_what_to_install():
    code = "import sys; sys.modules['langchain_core'] = None; import rc_agents.adapters.langchain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: rc_agents.adapters.langchain needs langchain-core; "
        "run: pip install 'rc-agents[langchain]'"
    )
