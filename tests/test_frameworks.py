"""The adapters of agent frameworks, against the installed framework; `make frameworks` installs and runs them all."""

import contextlib
from typing import Literal

import pytest

from rc_agents.errors import InputError
from rc_agents.service import GenerationParams, GenerationService
from tests.ensembles import talking

pytestmark = [pytest.mark.tiny, pytest.mark.filterwarnings("ignore")]  # their warnings are theirs
USER = [{"role": "user", "content": "Where is the river?"}]


MODEL = talking("medical", room=8192)
SERVICE = GenerationService(MODEL)


def told(prompt=USER, **options):
    return SERVICE.generate(prompt, GenerationParams(**{"max_new_tokens": 6, **options})).text


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
    with pytest.raises(InputError, match="temperature"):
        EnsembleModel(MODEL, temperature=-1).generate(asked)


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
    with pytest.raises(InputError, match="top_p"):
        EnsembleLLM(MODEL, top_p=2)


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
    assert reply.meta["usage"]["completion_tokens"] == 6
    tool = create_tool_from_function(weather)
    more = {"max_tokens": 150, "tool_choice": "required"}
    (called,) = llm.run(asked, more, tools=[tool])["replies"]
    assert called.tool_call.arguments["city"] in ("Rome", "Paris")
    result = ChatMessage.from_tool("dry", origin=called.tool_call)
    assert llm.run([*asked, called, result])["replies"][0].text
    saved = EnsembleChatGenerator("my-ensemble", generation_kwargs={"max_tokens": 3})
    pipeline = haystack.Pipeline()
    pipeline.add_component("llm", saved)
    own = ["rc_agents.adapters.haystack"]
    again = haystack.Pipeline.loads(pipeline.dumps(), allowed_modules=own)
    assert again.get_component("llm").model == "my-ensemble"
    with pytest.raises(InputError, match="path or id"):
        llm.to_dict()
