"""The adapters of agent frameworks, against the installed framework; `make frameworks` installs and runs them all."""

import asyncio
import base64
import contextlib
import functools
import gc
import importlib.util
import io
import json
import re
import runpy
import threading
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image
from pydantic import BaseModel

from rc_agents.errors import InputError
from rc_agents.service import GenerationParams, GenerationService
from tests.ensembles import talking
from tests.sensing import ensemble, picture, processors, sound
from tests.server_running import running
from tests.stand_ins import run_on_tiny_models

pytestmark = [pytest.mark.tiny, pytest.mark.filterwarnings("ignore")]  # their warnings are theirs
USER = [{"role": "user", "content": "Where is the river?"}]


MODEL = talking("medical", room=8192)
SERVICE = GenerationService(MODEL)


class Place(BaseModel):
    """What an answer's object holds."""

    city: Literal["Rome", "Paris"]


def places(city: str) -> str:
    """Tells of a place."""
    return city


def told(prompt=USER, **options):
    return SERVICE.generate(prompt, GenerationParams(**{"max_new_tokens": 6, **options})).text


@pytest.fixture(autouse=True)
def _collected():
    yield
    gc.collect()  # clients that frameworks leave open, while their warnings are ignored


# smolagents.


def test_smolagents_model_answers_streams_and_calls():
    models = pytest.importorskip("smolagents.models", reason="not installed; run make frameworks")
    from rc_agents.adapters.smolagents import EnsembleModel
    from smolagents import Tool

    class Weather(Tool):
        name = "weather"
        description = "Tells the weather"
        inputs = {"city": {"type": "string", "enum": ["Rome", "Paris"], "description": "where"}}  # noqa: RUF012
        output_type = "string"

        def forward(self, city: str) -> str:
            return "dry"

    model = EnsembleModel(MODEL, specialists=["medical"], max_tokens=6)
    asked = [
        models.ChatMessage(role="user", content=[{"type": "text", "text": "Where is the river?"}])
    ]
    found = model.generate(asked)
    assert found.content == told()
    assert found.token_usage.output_tokens == 6
    stop = found.content[2]
    cut = model(asked, stop_sequences=[stop]).content
    assert cut == found.content[: found.content.index(stop)]
    pieces = list(model.generate_stream(asked))
    assert "".join(one.content for one in pieces) == found.content
    assert pieces[-1].token_usage.output_tokens == 6
    calling = EnsembleModel(MODEL, max_tokens=150)
    (call,) = calling.generate(asked, tools_to_call_from=[Weather()]).tool_calls
    assert call.function.name == "weather"
    assert call.function.arguments["city"] in ("Rome", "Paris")
    for option in ({"temperature": -1}, {"max_token": 3}):
        with pytest.raises(InputError, match=next(iter(option))):
            EnsembleModel("nowhere", **option)  # no model is loaded for it
    told_so = EnsembleModel(MODEL, max_tokens=6)
    assert told_so.generate(asked, specialists=["medical"]).content == told()
    with pytest.raises(InputError, match="max_token"):
        told_so.generate(asked, max_token=3)
    removed = EnsembleModel(MODEL, max_tokens=150, tool_choice=models.REMOVE_PARAMETER)
    assert removed.generate(asked, tools_to_call_from=[Weather()]).content


def test_a_smolagents_agent_runs_to_its_last_step():
    pytest.importorskip("smolagents", reason="not installed; run make frameworks")
    from rc_agents.adapters.smolagents import EnsembleModel
    from smolagents import FinalAnswerTool, ToolCallingAgent

    class Answer(FinalAnswerTool):
        inputs = {"answer": {"type": "string", "enum": ["yes", "no"], "description": "it"}}  # noqa: RUF012

    agent = ToolCallingAgent(
        tools=[Answer()], model=EnsembleModel(MODEL, max_tokens=120), max_steps=1, verbosity_level=0
    )
    agent.tools = {"final_answer": Answer()}
    assert agent.run("Is it so?") in ("yes", "no")


# LlamaIndex.


def test_llama_index_llm_completes_chats_and_streams():
    types = pytest.importorskip(
        "llama_index.core.base.llms.types", reason="not installed; run make frameworks"
    )
    from rc_agents.adapters.llama_index import EnsembleLLM

    llm = EnsembleLLM(MODEL, max_tokens=6, specialists=["medical"])
    assert llm.complete("The river").text == told("The river")
    assert llm.complete("The river", max_tokens=2).raw["usage"]["completion_tokens"] == 2
    pieces = list(llm.stream_complete("The river"))
    assert "".join(one.delta for one in pieces) == pieces[-1].text == told("The river")
    turn = [types.ChatMessage(role="user", content="Where is the river?")]
    assert llm.chat(turn).message.content == told()
    assert list(llm.stream_chat(turn))[-1].message.content == told()
    assert llm.metadata.context_window == 8192
    assert llm.metadata.is_chat_model
    for option in ({"top_p": 2}, {"max_token": 3}):
        with pytest.raises(InputError, match=next(iter(option))):
            EnsembleLLM("nowhere", **option)  # no model is loaded for it
    with pytest.raises(InputError, match="max_token"):
        llm.complete("The river", max_token=3)
    assert llm.complete("The river", max_new_tokens=2).raw["usage"]["completion_tokens"] == 2
    picture = types.ImageBlock(url="http://localhost/a.png")
    source = types.CitableBlock(title="a", source="b", content=[types.TextBlock(text="c")])
    for block, message in ((picture, "nothing is fetched"), (source, "got a block of type")):
        with pytest.raises(InputError, match=message):
            llm.chat([types.ChatMessage(role="user", blocks=[block])])


def test_a_llama_index_query_engine_answers_from_documents():
    core = pytest.importorskip("llama_index.core", reason="not installed; run make frameworks")
    from llama_index.core.embeddings import MockEmbedding
    from rc_agents.adapters.llama_index import EnsembleLLM

    index = core.VectorStoreIndex.from_documents(
        [core.Document(text="The river came down from the hills.")], embed_model=MockEmbedding(4)
    )
    engine = index.as_query_engine(llm=EnsembleLLM(MODEL, max_tokens=5))
    found = engine.query("Where did the river come from?")
    assert str(found)
    assert found.source_nodes[0].text == "The river came down from the hills."


# pydantic-ai.


def test_pydantic_ai_model_answers_calls_tools_and_makes_objects():
    ai = pytest.importorskip("pydantic_ai", reason="not installed; run make frameworks")
    from pydantic import BaseModel
    from rc_agents.adapters.pydantic_ai import EnsembleModel

    class Place(BaseModel):
        city: Literal["Rome", "Paris"]

    def model(tokens):
        return EnsembleModel(MODEL, specialists=["medical"], settings={"max_tokens": tokens})

    plain = ai.Agent(model(6)).run_sync("Where is the river?")
    assert plain.output == told()
    assert plain.usage.output_tokens == 6
    by_tool = ai.Agent(model(200), output_type=Place).run_sync("Where?")
    assert by_tool.output.city in ("Rome", "Paris")
    native = ai.Agent(model(100), output_type=ai.NativeOutput(Place)).run_sync("Where?")
    assert native.output.city in ("Rome", "Paris")

    seen = []
    agent = ai.Agent(model(400), output_type=Place, instructions="Be brief.", retries=2)

    @agent.tool_plain
    def weather(city: Literal["Rome", "Paris"]) -> str:
        seen.append(city)
        return "dry"

    with contextlib.suppress(ai.UsageLimitExceeded):  # random weights may call the tool for ever
        agent.run_sync("Where?", usage_limits=ai.UsageLimits(request_limit=4))
    assert set(seen) <= {"Rome", "Paris"}


def test_pydantic_ai_settings_are_honoured_or_named():
    ai = pytest.importorskip("pydantic_ai", reason="not installed; run make frameworks")
    from pydantic_ai.exceptions import UnsupportedSettingWarning
    from pydantic_ai.messages import ToolCallPart
    from pydantic_ai.models import ModelRequestParameters
    from pydantic_ai.settings import ModelSettings
    from pydantic_ai.tools import ToolDefinition
    from rc_agents.adapters import pydantic_ai as adapter

    model = adapter.EnsembleModel(MODEL, specialists=["medical"], settings={"max_tokens": 6})
    asked = [ai.ModelRequest.user_text_prompt("Where is the river?")]
    properties = {"city": {"enum": ["Rome", "Paris"]}}
    form = {"type": "object", "properties": properties, "required": ["city"]}
    tools = [ToolDefinition(name=name, parameters_json_schema=form) for name in ("rain", "snow")]
    offered = ModelRequestParameters(function_tools=tools)

    def answer(params=None, **settings):
        return asyncio.run(model.request(asked, settings, params or ModelRequestParameters()))

    assert answer(temperature=1.0, top_k=1, seed=1).text == told()
    (first,) = MODEL.tokenizer(told(), add_special_tokens=False)["input_ids"][:1]
    assert answer(logit_bias={str(first): -100}).text != told()
    with pytest.raises(InputError, match=r"a token of logit_bias is .* got 'river'"):
        answer(logit_bias={"river": 1})
    assert answer(offered, tool_choice="none").text == told()
    for wanted in ("required", ["snow"]):
        (call,) = answer(offered, tool_choice=wanted, max_tokens=200).parts
        assert isinstance(call, ToolCallPart)
        assert call.tool_name in (["snow"] if wanted != "required" else ["rain", "snow"])
    assert answer(openai_reasoning_effort="low").text == told()
    assert answer(rc_agents_specialists=[]).text == told(specialists=[])
    assert answer(rc_agents_strength=0.0).text == told(specialists=["medical"], strength=0.0)
    with pytest.raises(InputError, match=r"'max_token' is no setting; .*did you mean 'max_tokens'"):
        answer(max_token=3)
    with pytest.raises(InputError, match="'temprature' is no setting"):
        adapter.EnsembleModel("nowhere", settings={"temprature": 1.0})  # no model is loaded for it
    with pytest.warns(UnsupportedSettingWarning, match="`max_retries` setting is not supported"):
        answer(max_retries=2)
    theirs = {"request_timeout", "first_event_timeout", "framing_announcement", "thinking", "cache"}
    ours = {"max_tokens", "stop_sequences", "logit_bias", "tool_choice", "parallel_tool_calls"}
    known = {*adapter.PARAMS, *adapter.IGNORED, *ours, *theirs}
    assert known == set(ModelSettings.__annotations__)


def test_pydantic_ai_model_streams_text_calls_and_objects():
    ai = pytest.importorskip("pydantic_ai", reason="not installed; run make frameworks")
    from pydantic import BaseModel
    from rc_agents.adapters.pydantic_ai import EnsembleModel

    class Place(BaseModel):
        city: Literal["Rome", "Paris"]

    def agent(tokens, **options):
        model = EnsembleModel(MODEL, specialists=["medical"], settings={"max_tokens": tokens})
        return ai.Agent(model, **options)

    async def texts():
        async with agent(6).run_stream("Where is the river?") as run:
            pieces = [one async for one in run.stream_text(delta=True, debounce_by=None)]
        return pieces, run.usage.output_tokens

    async def whole(form):
        async with agent(200, output_type=form).run_stream("Where?") as run:
            return await run.get_output()

    async def left():
        async with agent(2000).run_stream("Where is the river?") as run:
            await anext(run.stream_text(delta=True, debounce_by=None))
            await run.cancel()
        return run

    pieces, tokens = asyncio.run(texts())
    assert "".join(pieces) == told()
    assert len(pieces) > 1
    assert tokens == 6
    assert asyncio.run(whole(Place)).city in ("Rome", "Paris")
    assert asyncio.run(whole(ai.NativeOutput(Place))).city in ("Rome", "Paris")
    assert asyncio.run(left()).response.state == "interrupted"
    assert "rc_agents-stream" not in [one.name for one in threading.enumerate()]


# Microsoft's Agent Framework.


def test_agent_framework_client_answers_streams_and_is_cut_by_stop():
    af = pytest.importorskip("agent_framework", reason="not installed; run make frameworks")
    from rc_agents.adapters.agent_framework import EnsembleChatClient

    client = EnsembleChatClient(MODEL, max_tokens=6, specialists=["medical"])
    asked = [af.Message("user", ["Where is the river?"])]

    def answer(**options):
        return asyncio.run(_got(client.get_response(asked, options=options)))

    async def streamed():
        stream = client.get_response(asked, stream=True)
        pieces = [one.text async for one in stream]
        return pieces, await stream.get_final_response()

    whole = answer()
    assert whole.text == told()
    assert whole.finish_reason == "length"
    assert whole.usage_details["output_token_count"] == 6
    assert answer(stop=[whole.text[2]]).text == whole.text[: whole.text.index(whole.text[2])]
    pieces, final = asyncio.run(streamed())
    assert "".join(pieces) == final.text == whole.text
    assert len([one for one in pieces if one]) > 1
    assert final.usage_details == whole.usage_details
    assert final.finish_reason == "length"
    ruled = [{"role": "system", "content": "Be brief."}, *USER]
    assert answer(instructions="Be brief.").text == told(ruled, specialists=["medical"])
    first = SERVICE.encode(whole.text).token_ids[0]
    assert answer(logit_bias={str(first): -100}).text != whole.text
    assert answer(presence_penalty=0.0).text == whole.text
    for option in ({"presence_penalty": 1.0}, {"conversation_id": "7"}, {"logit_bias": {"a": 1}}):
        with pytest.raises(InputError, match=next(iter(option))):
            answer(**option)
    with pytest.raises(InputError, match=r"max_token.*did you mean"):
        EnsembleChatClient(MODEL, max_token=6)
    picture = af.Content.from_uri("http://localhost/a.png", media_type="image/png")
    asked = [af.Message("user", [picture])]
    with pytest.raises(InputError, match="nothing is fetched from elsewhere"):
        answer()


async def _got(coming):
    return await coming


def test_an_agent_framework_agent_calls_its_tool_and_makes_objects():
    af = pytest.importorskip("agent_framework", reason="not installed; run make frameworks")
    from pydantic import BaseModel
    from rc_agents.adapters.agent_framework import EnsembleChatClient

    class Place(BaseModel):
        city: Literal["Rome", "Paris"]

    seen = []

    @af.tool(approval_mode="never_require")
    def weather(city: Literal["Rome", "Paris"]) -> str:
        """Tells the weather."""
        seen.append(city)
        return "dry"

    agent = af.Agent(EnsembleChatClient(MODEL, max_tokens=80), instructions="Be brief.")
    must = {"tools": [weather], "tool_choice": "required"}
    found = asyncio.run(agent.run("Where?", options=must))
    assert len(seen) == 1
    assert set(seen) <= {"Rome", "Paris"}
    kinds = [content.type for message in found.messages for content in message.contents]
    assert kinds[:2] == ["function_call", "function_result"]
    assert found.text

    async def streamed():
        coming = agent.run("Where?", stream=True, options=must)
        return [content.type async for one in coming for content in one.contents]

    assert {"function_call", "function_result", "text"} <= set(asyncio.run(streamed()))
    for form in (Place, {"schema": Place.model_json_schema(), "strict": True}):
        made = asyncio.run(agent.run("Where?", options={"response_format": form})).text
        assert Place.model_validate_json(made).city in ("Rome", "Paris")


# CrewAI.


@pytest.fixture
def crewai(monkeypatch, tmp_path):
    for name in ("CREWAI_DISABLE_TELEMETRY", "CREWAI_TESTING", "OTEL_SDK_DISABLED"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("CREWAI_TRACING_ENABLED", "false")
    monkeypatch.setenv("CREWAI_STORAGE_DIR", str(tmp_path))
    return pytest.importorskip("crewai", reason="not installed; run make frameworks")


def test_crewai_llm_answers_streams_counts_and_makes_objects(crewai):
    from pydantic import BaseModel
    from rc_agents.adapters.crewai import EnsembleLLM

    class Place(BaseModel):
        city: Literal["Rome", "Paris"]

    asked = "Where is the river?"
    llm = EnsembleLLM(MODEL, max_tokens=6, specialists=["medical"])
    assert llm.call(asked) == told() == asyncio.run(llm.acall(asked))
    assert llm.get_token_usage_summary().completion_tokens == 12
    assert llm.get_input_tokens_count(asked) == SERVICE.count_tokens(USER)
    assert llm.get_context_window_size() == int(0.85 * 8192)
    with llm.stream_events(USER) as stream:
        chunks = [one.content for one in stream if one.type == "llm_stream_chunk"]
    assert "".join(chunks) == stream.result == told()
    assert len(chunks) > 1
    stop = told()[2]
    cut = EnsembleLLM(MODEL, max_tokens=6, specialists=["medical"], stop=stop).call(asked)
    assert cut == told()[: told().index(stop)]
    wide = EnsembleLLM(MODEL, max_tokens=100)
    assert wide.call("Where?", response_model=Place).city in ("Rome", "Paris")
    with pytest.raises(ValueError, match="Place"):
        EnsembleLLM(MODEL, max_tokens=3).call("Where?", response_model=Place)
    first = SERVICE.encode(told()).token_ids[0]
    other = EnsembleLLM(MODEL, max_tokens=6, specialists=["medical"], logit_bias={first: -100})
    assert other.call(asked) != told()
    for wrong in ({"top_p": 2}, {"presence_penalty": 1.0}, {"colour": "red"}, {"n": 2}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            EnsembleLLM(MODEL, **wrong)


def test_a_crewai_crew_calls_its_tool_and_ends(crewai):
    from crewai.tools import tool
    from rc_agents.adapters.crewai import EnsembleLLM

    seen = []

    @tool("weather", result_as_answer=True)
    def weather(city: Literal["Rome", "Paris"]) -> str:
        """Tells the weather."""
        seen.append(city)
        return "dry"

    llm = EnsembleLLM(MODEL, max_tokens=150, tool_choice="required")
    guide = crewai.Agent(role="guide", goal="answer", backstory="brief", llm=llm, tools=[weather])
    task = crewai.Task(description="Where?", expected_output="the weather", agent=guide)
    found = crewai.Crew(agents=[guide], tasks=[task]).kickoff()
    assert found.raw == "dry"
    assert len(seen) == 1
    assert set(seen) <= {"Rome", "Paris"}
    assert found.token_usage.successful_requests == 1
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    given = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    (call,) = llm.call("Where?", tools=[given])
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    named = {"weather": lambda city: city.upper()}
    assert llm.call("Where?", tools=[given], available_functions=named) == "ROME"
    llm.max_tokens = len(
        SERVICE.encode('<tool_call>\n{"name": "weather", "arguments": {"ci').token_ids
    )
    with pytest.raises(ValueError, match=r"the call of 'weather' has no JSON .* more max_tokens"):
        llm.call("Where?", tools=[given], available_functions=named)


# Haystack.


def test_haystack_generator_answers_streams_and_is_saved(tmp_path):
    haystack = pytest.importorskip("haystack", reason="not installed; run make frameworks")
    from haystack.dataclasses import ChatMessage
    from haystack.tools import create_tool_from_function
    from rc_agents.adapters.haystack import EnsembleChatGenerator

    def weather(city: Literal["Rome", "Paris"]) -> str:
        """Tells the weather."""
        return "dry"

    pieces = []
    options = {"max_tokens": 6, "specialists": ["medical"]}
    llm = EnsembleChatGenerator(MODEL, generation_kwargs=options)
    pipeline = haystack.Pipeline()
    pipeline.add_component("llm", llm)
    asked = [ChatMessage.from_user("Where is the river?")]
    found = pipeline.run({"llm": {"messages": asked, "streaming_callback": pieces.append}})
    (reply,) = found["llm"]["replies"]
    assert reply.text == told() == "".join(one.content for one in pieces)
    assert (pieces[0].start, pieces[-1].finish_reason) == (True, "length")
    assert reply.meta["usage"] == {"prompt_tokens": 22, "completion_tokens": 6, "total_tokens": 28}
    tool = create_tool_from_function(weather)
    more = {"max_tokens": 150, "tool_choice": "required"}
    pieces.clear()
    (called,) = llm.run(asked, more, tools=[tool], streaming_callback=pieces.append)["replies"]
    assert called.tool_call.arguments["city"] in ("Rome", "Paris")
    (delta,) = (call for one in pieces for call in one.tool_calls or ())
    assert json.loads(delta.arguments) == called.tool_call.arguments
    assert not any("tool_call" in one.content for one in pieces)  # the call's tags are no text
    assert pieces[-1].finish_reason == called.meta["finish_reason"] == "tool_calls"
    assert {one.component_info.name for one in pieces} == {"llm"}
    size = called.meta["usage"]["completion_tokens"] - 12  # within its arguments
    (cut,) = llm.run(asked, {**more, "max_tokens": size}, tools=[tool])["replies"]
    assert (cut.tool_calls, len(cut.meta["invalid_tool_calls"])) == ([], 1)
    result = ChatMessage.from_tool("dry", origin=called.tool_call)
    assert llm.run([*asked, called, result])["replies"][0].text
    saved = EnsembleChatGenerator(
        "my-ensemble", [create_tool_from_function(places)], print, {"response_format": Place}
    )
    pipeline = haystack.Pipeline()
    pipeline.add_component("llm", saved)
    own = ["rc_agents.adapters.haystack", "tests.test_frameworks", "builtins"]
    again = haystack.Pipeline.loads(pipeline.dumps(), allowed_modules=own).get_component("llm")
    assert (again.model, again.streaming_callback, again.tools) == (
        "my-ensemble",
        print,
        saved.tools,
    )
    assert again.generation_kwargs["response_format"]["json_schema"]["name"] == "Place"
    with pytest.raises(InputError, match="path or id"):
        llm.to_dict()
    for option in ({"n": 2}, {"frequency_penalty": 1.0}, {"temperature": -1}):
        with pytest.raises(InputError, match=next(iter(option))):
            llm.run(asked, option)
        with pytest.raises(InputError, match=next(iter(option))):
            EnsembleChatGenerator(MODEL, generation_kwargs=option)


def test_haystack_generator_answers_an_event_loop():
    pytest.importorskip("haystack", reason="not installed; run make frameworks")
    from rc_agents.adapters.haystack import EnsembleChatGenerator

    llm = EnsembleChatGenerator(MODEL, generation_kwargs={"max_tokens": 6})
    pieces, later, ticks = [], [], []

    async def show(chunk):
        pieces.append(chunk.content)

    async def tick():
        while True:
            ticks.append(len(pieces))
            await asyncio.sleep(0)

    async def asked():
        beside = asyncio.create_task(tick())
        found = await llm.run_async(USER[0]["content"], streaming_callback=show)
        beside.cancel()
        form = {"max_tokens": 100, "response_format": Place}
        return found, await llm.run_async("Where?", form, streaming_callback=later.append)

    found, formed = asyncio.run(asked())
    assert found["replies"][0].text == told(specialists=None) == "".join(pieces)
    assert len(set(ticks)) > 2  # the loop went on between pieces
    (reply,) = formed["replies"]
    assert Place.model_validate_json(reply.text).city in ("Rome", "Paris")
    assert reply.text == "".join(one.content for one in later)
    for awaited in (show, lambda chunk: show(chunk)):
        with pytest.raises(InputError, match="run_async"):
            llm.run("Where?", streaming_callback=awaited)
    with pytest.raises(InputError, match="response_format"):
        llm.run("Where?", {"response_format": dict})


# Pictures and sounds.


PICTURE, SOUND, QUESTION = picture(), sound(), "What is here?"


@functools.cache
def senses():
    return GenerationService(ensemble(), processors())


def of_senses(asked, **media):
    """What a service answers that is asked directly; and that what it is shown matters."""
    params = GenerationParams(max_new_tokens=6, temperature=0.0)
    parts = [{"type": kind, kind: data} for kind, data in media.items()]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": asked}]}
    seen, alone = senses().batch(
        [senses().converse([one]).prompt for one in (turn, {**turn, "content": asked})], params
    )
    assert seen.text != alone.text
    return seen.text


def test_smolagents_shows_its_pictures():
    models = pytest.importorskip("smolagents.models", reason="not installed; run make frameworks")
    from rc_agents.adapters.smolagents import EnsembleModel

    model = EnsembleModel(senses(), max_tokens=6, temperature=0.0)
    image = {"type": "image", "image": Image.open(io.BytesIO(PICTURE))}
    asked = [models.ChatMessage(role="user", content=[image, {"type": "text", "text": QUESTION}])]
    assert model.generate(asked).content == of_senses(QUESTION, image=PICTURE)
    with pytest.raises(InputError, match="no model of this ensemble takes a picture"):
        EnsembleModel(MODEL, max_tokens=6).generate(asked)
    apart = [{"type": "text", "text": "One."}, image, {"type": "text", "text": QUESTION}]
    answered = model.generate([models.ChatMessage(role="user", content=apart)]).content
    assert answered == of_senses(f"One.\n{QUESTION}", image=PICTURE)
    told_twice = [
        models.ChatMessage(role="user", content=[{"type": "text", "text": one}])
        for one in ("One.", "Two.")
    ]
    both = senses().converse([{"role": "user", "content": "One.\nTwo."}]).prompt
    limits = GenerationParams(max_new_tokens=6, temperature=0.0)
    assert model.generate(told_twice).content == senses().generate(both, limits).text


def test_llama_index_shows_pictures_and_sounds(tmp_path):
    types = pytest.importorskip(
        "llama_index.core.base.llms.types", reason="not installed; run make frameworks"
    )
    from rc_agents.adapters.llama_index import EnsembleLLM

    llm = EnsembleLLM(senses(), max_tokens=6, temperature=0.0)
    (tmp_path / "it.png").write_bytes(PICTURE)
    said = types.TextBlock(text=QUESTION)
    address = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    for image in (
        types.ImageBlock(image=PICTURE),
        types.ImageBlock(path=tmp_path / "it.png"),
        types.ImageBlock(url=address),
    ):
        turn = [types.ChatMessage(role="user", blocks=[image, said])]
        assert llm.chat(turn).message.content == of_senses(QUESTION, image=PICTURE)
    parted = [types.TextBlock(text="One."), types.ImageBlock(image=PICTURE), said]
    answered = llm.chat([types.ChatMessage(role="user", blocks=parted)]).message.content
    assert answered == of_senses(f"One.\n{QUESTION}", image=PICTURE)
    for wrong in (
        types.ImageBlock(url="data:image/png;base64,@@@"),
        types.ImageBlock(url="data:image/png"),
        types.ImageBlock(),
        types.AudioBlock(url="http://localhost/a.wav"),
        types.ImageBlock(path=tmp_path / "it.png").model_copy(update={"path": tmp_path / "no"}),
    ):
        with pytest.raises(InputError):
            llm.chat([types.ChatMessage(role="user", blocks=[wrong])])
    turn = [types.ChatMessage(role="user", blocks=[types.AudioBlock(audio=SOUND), said])]
    assert llm.chat(turn).message.content == of_senses(QUESTION, audio=SOUND)


def test_pydantic_ai_shows_pictures_and_sounds():
    ai = pytest.importorskip("pydantic_ai", reason="not installed; run make frameworks")
    from rc_agents.adapters.pydantic_ai import EnsembleModel

    agent = ai.Agent(EnsembleModel(senses(), settings={"max_tokens": 6, "temperature": 0.0}))
    image = ai.BinaryContent(PICTURE, media_type="image/png")
    expected = of_senses(QUESTION, image=PICTURE)
    assert agent.run_sync([image, QUESTION]).output == expected
    assert agent.run_sync([ai.ImageUrl(image.data_uri), QUESTION]).output == expected
    said = ai.messages.TextContent("What is")
    asked = [said, image, ai.CachePoint(), "here?"]
    assert agent.run_sync(asked).output == of_senses("What is\nhere?", image=PICTURE)
    noise = ai.BinaryContent(SOUND, media_type="audio/wav")
    assert agent.run_sync([noise, QUESTION]).output == of_senses(QUESTION, audio=SOUND)
    for content, message in (
        (ai.ImageUrl("http://localhost/a.png"), "nothing is fetched"),
        (ai.AudioUrl("http://localhost/a.wav"), "got a AudioUrl; give its bytes"),
        (ai.BinaryContent(b"%PDF", media_type="application/pdf"), "got a BinaryContent"),
    ):
        with pytest.raises(InputError, match=message):
            agent.run_sync([content, QUESTION])


def of_a_call(image):
    """The answer to a call's result, with a picture in it or without."""
    call = {"id": "c1", "function": {"name": "look", "arguments": "{}"}}
    result = [
        {"type": "text", "text": "see"},
        *([{"type": "image", "image": image}] if image else ()),
    ]
    talk = senses().converse(
        [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": result},
        ]
    )
    return senses().generate(talk.prompt, GenerationParams(max_new_tokens=6, temperature=0.0)).text


def test_what_a_tool_of_pydantic_ai_shows_is_seen():
    ai = pytest.importorskip("pydantic_ai", reason="not installed; run make frameworks")
    from pydantic_ai import messages
    from pydantic_ai.models import ModelRequestParameters
    from rc_agents.adapters.pydantic_ai import EnsembleModel

    model = EnsembleModel(senses(), settings={"max_tokens": 6, "temperature": 0.0})
    image = ai.BinaryContent(PICTURE, media_type="image/png")
    history = [
        messages.ModelRequest.user_text_prompt(QUESTION),
        messages.ModelResponse([messages.ToolCallPart("look", "{}", "c1")]),
    ]

    def answer(content):
        told = messages.ModelRequest([messages.ToolReturnPart("look", content, "c1")])
        asked = ModelRequestParameters()
        return asyncio.run(model.request([*history, told], None, asked)).parts[0].content

    assert answer(["see", image]) == of_a_call(PICTURE) != of_a_call(None)
    assert answer("see") == of_a_call(None)


def test_what_a_tool_of_agent_framework_shows_is_seen():
    af = pytest.importorskip("agent_framework", reason="not installed; run make frameworks")
    from rc_agents.adapters.agent_framework import EnsembleChatClient

    client = EnsembleChatClient(senses(), max_tokens=6, temperature=0.0)
    image = af.Content.from_data(PICTURE, media_type="image/png")

    def answer(*contents):
        asked = [
            af.Message("user", [af.Content.from_text(QUESTION)]),
            af.Message("assistant", [af.Content.from_function_call("c1", "look", arguments="{}")]),
            af.Message("tool", [af.Content.from_function_result("c1", result=[*contents])]),
        ]
        return asyncio.run(_got(client.get_response(asked))).text

    assert answer(af.Content.from_text("see"), image) == of_a_call(PICTURE) != of_a_call(None)
    assert answer(af.Content.from_text("see")) == of_a_call(None)


def test_agent_framework_shows_pictures_and_sounds():
    af = pytest.importorskip("agent_framework", reason="not installed; run make frameworks")
    from rc_agents.adapters.agent_framework import EnsembleChatClient

    client = EnsembleChatClient(senses(), max_tokens=6, temperature=0.0)

    def answer(content):
        asked = [af.Message("user", [content, af.Content.from_text(QUESTION)])]
        return asyncio.run(_got(client.get_response(asked))).text

    image = af.Content.from_data(PICTURE, media_type="image/png")
    assert answer(image) == of_senses(QUESTION, image=PICTURE)
    noise = af.Content.from_data(SOUND, media_type="audio/wav")
    assert answer(noise) == of_senses(QUESTION, audio=SOUND)
    with pytest.raises(InputError, match=r"got data of the media type 'application/pdf'"):
        answer(af.Content.from_data(b"%PDF", media_type="application/pdf"))


def test_crewai_shows_pictures(crewai):
    from rc_agents.adapters.crewai import EnsembleLLM

    llm = EnsembleLLM(senses(), max_tokens=6, temperature=0.0)
    address = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "text", "text": QUESTION},
    ]
    assert llm.call([{"role": "user", "content": parts}]) == of_senses(QUESTION, image=PICTURE)
    with pytest.raises(InputError, match="no input files of CrewAI's"):
        llm.call([{"role": "user", "content": QUESTION, "files": {"it": PICTURE}}])


def test_haystack_shows_pictures():
    dataclasses = pytest.importorskip(
        "haystack.dataclasses", reason="not installed; run make frameworks"
    )
    from rc_agents.adapters.haystack import EnsembleChatGenerator

    generator = EnsembleChatGenerator(
        senses(), generation_kwargs={"max_tokens": 6, "temperature": 0.0}
    )
    image = dataclasses.ImageContent(base64.b64encode(PICTURE).decode(), mime_type="image/png")
    turn = dataclasses.ChatMessage.from_user(content_parts=[image, QUESTION])
    (reply,) = generator.run([turn])["replies"]
    assert reply.text == of_senses(QUESTION, image=PICTURE)
    with pytest.raises(InputError, match="this one holds a live ensemble"):
        generator.to_dict()


# Through the server.

SERVED = Path(__file__).parent.parent / "examples" / "served"


@pytest.fixture(scope="module")
def url():
    with running(MODEL) as server:
        yield f"{server.url}/v1"


@pytest.fixture
def printed(url, capsys, monkeypatch):
    """Runs an example against the server; returns the lines that it prints."""

    def run(name):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # DSPy's would fetch a table
        runpy.run_path(str(SERVED / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.strip().splitlines()

    return run


def test_an_openai_agents_agent_is_served(url, printed):
    agents = pytest.importorskip("agents", reason="not installed; run make frameworks")
    import openai
    from pydantic import BaseModel

    class Place(BaseModel):
        city: Literal["Rome", "Paris"]

    async def asked():
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            model = agents.OpenAIChatCompletionsModel("rc:medical", client)
            short, long = (agents.ModelSettings(max_tokens=size) for size in (6, 100))
            plain = agents.Agent("guide", model=model, model_settings=short)
            whole = await agents.Runner.run(plain, "Where is the river?")
            stream = agents.Runner.run_streamed(plain, "Where is the river?")
            kinds = [one.type async for one in stream.stream_events()]
            typed = agents.Agent("guide", model=model, model_settings=long, output_type=Place)
            made = await agents.Runner.run(typed, "Where?")
        return whole, kinds.count("raw_response_event"), stream.final_output, made.final_output

    assert set(printed("openai_agents")) <= {"Plague", "Influenza", "Measles"}
    agents.set_tracing_disabled(True)
    whole, pieces, streamed, made = asyncio.run(asked())
    assert whole.final_output == streamed == told()
    assert whole.raw_responses[0].usage.output_tokens == 6
    assert pieces > 6
    assert made.city in ("Rome", "Paris")


def test_an_autogen_team_is_served(url, printed):
    pytest.importorskip("autogen_agentchat", reason="not installed; run make frameworks")
    from autogen_agentchat.agents import AssistantAgent
    from autogen_core.models import UserMessage
    from autogen_core.tools import FunctionTool
    from autogen_ext.models.openai import OpenAIChatCompletionClient
    from pydantic import BaseModel

    class Place(BaseModel):
        city: Literal["Rome", "Paris"]

    def weather(city: Literal["Rome", "Paris"]) -> str:
        return "dry"

    lines = printed("autogen_team")
    assert lines[0] == "user: What is influenza?"
    assert {"writer", "reviser"} <= {line.partition(":")[0] for line in lines}
    knows = dict.fromkeys(("function_calling", "json_output", "structured_output"), True)
    info = {**knows, "vision": False, "family": "unknown"}
    asked = [UserMessage(content="Where is the river?", source="user")]

    async def main():
        client = OpenAIChatCompletionClient(
            model="rc:medical", base_url=url, api_key="none", model_info=info, max_tokens=100
        )
        short = {"max_tokens": 6}
        whole = await client.create(asked, extra_create_args=short)
        usage = {"include_usage": True, "extra_create_args": short}
        *pieces, last = [one async for one in client.create_stream(asked, **usage)]
        tool = FunctionTool(weather, description="Tells the weather.")
        called = await client.create(asked, tools=[tool], tool_choice="required")
        agent = AssistantAgent("guide", client, output_content_type=Place)
        made = (await agent.run(task="Where?")).messages[-1].content
        await client.close()
        return whole, pieces, last, called, made

    whole, pieces, last, called, made = asyncio.run(main())
    assert whole.content == "".join(pieces) == last.content == told()
    assert whole.usage.completion_tokens == last.usage.completion_tokens == 6
    assert called.finish_reason == "function_calls"
    assert Place.model_validate_json(called.content[0].arguments).city in ("Rome", "Paris")
    assert made.city in ("Rome", "Paris")


def test_an_ag2_agent_is_served(url, printed):
    ag2 = pytest.importorskip("ag2", reason="not installed; run make frameworks")
    from ag2.config import OpenAIConfig

    seen = []

    def weather(city: Literal["Rome", "Paris"]) -> str:
        """Tells the weather."""
        seen.append(city)
        return "dry"

    def config(tokens, **options):
        return OpenAIConfig(
            model="rc:medical", base_url=url, api_key="none", max_tokens=tokens, **options
        )

    async def main(**options):
        agent = ag2.Agent("guide", prompt="Be brief.", config=config(6, **options))
        reply = await agent.ask("Where is the river?")
        again = await reply.ask("And now?")
        return reply.body, again.body

    (line,) = printed("ag2_agent")
    assert line.startswith("Illness(code=")
    first, second = asyncio.run(main())
    talk = [{"role": "system", "content": "Be brief."}, *USER]
    assert first == told(talk, specialists=["medical"])
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    assert second == told(talk, specialists=["medical"])
    assert asyncio.run(main(streaming=True)) == (first, second)
    calling = config(100, extra_body={"tool_choice": "required"})
    agent = ag2.Agent("guide", config=calling, tools=[weather])

    async def until_called():
        asked = asyncio.create_task(agent.ask("Where?"))  # a call is required of it for ever
        while len(seen) < 2 and not asked.done():
            await asyncio.sleep(0.05)
        asked.cancel()

    asyncio.run(until_called())
    assert len(seen) >= 2
    assert set(seen) <= {"Rome", "Paris"}


def test_a_dspy_program_is_served(url, printed):
    pytest.importorskip("dspy", reason="not installed; run make frameworks")
    (line,) = printed("dspy_program")
    assert line in ("Plague", "Influenza", "Measles")
    import dspy

    options = {"api_base": url, "api_key": "none", "cache": False}
    lm = dspy.LM("openai/rc:medical", max_tokens=6, **options)
    assert lm(messages=USER) == [told()]
    assert lm.history[-1]["usage"]["completion_tokens"] == 6


def test_an_example_says_that_nobody_serves(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    needs = {
        "openai_agents": "agents",
        "autogen_team": "autogen_agentchat",
        "ag2_agent": "ag2",
        "dspy_program": "dspy",
    }
    assert set(needs) == {path.stem for path in SERVED.glob("*.py")}
    tried = [name for name, module in needs.items() if importlib.util.find_spec(module)]
    if not tried:
        pytest.skip("none of their frameworks is installed; run make frameworks")
    for name in tried:
        with pytest.raises(SystemExit, match="rc-agents serve package:demo") as caught:
            runpy.run_path(str(SERVED / f"{name}.py"), run_name="__main__")
        assert "\n" not in str(caught.value)


# The page.

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"
SECTION = re.compile(r"^## ([^\n]+)\n\n```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = {
    "smolagents": "smolagents",
    "LlamaIndex": "llama_index",
    "pydantic-ai": "pydantic_ai",
    "Haystack": "haystack",
    "CrewAI": "crewai",
    "Microsoft's Agent Framework": "agent_framework",
}


def test_the_page_shows_every_framework():
    assert [found[1] for found in SECTION.finditer(PAGE.read_text("utf-8"))] == list(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_what_the_page_shows_runs(name, tmp_path, capsys, request):
    if importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip(f"{name} is not installed; run make frameworks")
    if name == "CrewAI":
        request.getfixturevalue("crewai")
    text = PAGE.read_text("utf-8")
    (block,) = (found for found in SECTION.finditer(text) if found[1] == name)
    path = tmp_path / "shown.py"
    path.write_text(block[2], "utf-8")  # some read the source of a tool
    run_on_tiny_models(block[2], path, tmp_path / "stand-ins", {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
