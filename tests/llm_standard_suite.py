"""A standard suite for LangChain's plain text models, in the manner of langchain-tests, which has none for them.

A class under test subclasses `LLMStandardTests`, names itself and its parameters, and says how its model is watched.
Each test is one behaviour; its docstring says what is expected, and where to look when it fails. A test may be left out
only by an override that expects it to fail and says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.globals import get_llm_cache, set_llm_cache
from langchain_core.language_models import BaseLLM
from langchain_core.load import dumpd, dumps, load, loads
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField

T = TypeVar("T")


@dataclass
class Watched:
    """What a model did while it was watched.

    Attributes:
        batches: prompts of each call that reached the model.
        steps: passes through the model.
    """

    batches: list[int] = field(default_factory=list)
    steps: int = 0

    def rests(self, seconds: float = 0.15, patience: float = 5.0) -> bool:
        """Whether the model makes no pass for so many seconds, within its patience."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            before = self.steps
            time.sleep(seconds)
            if self.steps == before:
                return True
        return False


class Recorder(BaseCallbackHandler):
    """Keeps what callbacks are told."""

    def __init__(self) -> None:
        self.starts: list[tuple[uuid.UUID, list[str], dict[str, Any]]] = []
        self.tokens: list[str] = []
        self.ends: list[tuple[uuid.UUID, LLMResult]] = []
        self.errors: list[BaseException] = []

    def on_llm_start(self, serialized: Any, prompts: list[str], **kwargs: Any) -> None:
        self.starts.append((kwargs["run_id"], prompts, kwargs))

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens.append(token)

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.ends.append((kwargs["run_id"], response))

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)

    @property
    def infos(self) -> list[dict[str, Any]]:
        """The generation info of each answer."""
        return [end.generations[0][0].generation_info or {} for _, end in self.ends]


class AsyncRecorder(AsyncCallbackHandler):
    """The same for handlers that are coroutines."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("start")

    async def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("end")


async def beside(work: Awaitable[T]) -> tuple[T, float, float]:
    """Awaits something; returns its result, its seconds, and the longest the event loop was held up meanwhile."""
    task = asyncio.ensure_future(work)
    begun = last = time.monotonic()
    longest = 0.0
    while not task.done():
        await asyncio.sleep(0.002)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return await task, time.monotonic() - begun, longest


class LLMStandardTests(ABC):
    """The suite; subclass it, and give it what has no default here."""

    @property
    @abstractmethod
    def llm_class(self) -> type[BaseLLM]:
        """The class under test."""

    @property
    @abstractmethod
    def llm_params(self) -> dict[str, Any]:
        """What it is made with, but for `standard_llm_params`."""

    @abstractmethod
    def watched(
        self, llm: BaseLLM, pause: float = 0.0
    ) -> contextlib.AbstractContextManager[Watched]:
        """Watches the model behind an object; each of its passes takes at least `pause` seconds."""

    @property
    def standard_llm_params(self) -> dict[str, Any]:
        """Greedy, and short."""
        return {"temperature": 0.0, "max_tokens": 8}

    @property
    def shorter(self) -> dict[str, Any]:
        """One field with a value that cuts an answer short: as field, argument, bound and configured."""
        return {"max_tokens": 2}

    @property
    def long_params(self) -> dict[str, Any]:
        """Fields with which an answer takes a hundred passes or more."""
        return {"max_tokens": 150}

    @property
    def sampling_params(self) -> dict[str, Any]:
        """Fields with which answers differ from one another."""
        return {"temperature": 1.0, "max_tokens": 12}

    @property
    def prompts(self) -> list[str]:
        """Several, of different lengths."""
        return ["The river", "Once upon a time there was a house", "Rain"]

    @property
    def unanswerable(self) -> str:
        """A prompt that is refused."""
        return ""

    @property
    def refusal(self) -> type[Exception]:
        """The error of it."""
        return ValueError

    @property
    def namespaces(self) -> list[str]:
        """The packages from which `load` may take the class."""
        return [self.llm_class.__module__.split(".")[0]]

    def make(self, **fields: Any) -> BaseLLM:
        """Makes an object under test."""
        return self.llm_class(**{**self.llm_params, **self.standard_llm_params, **fields})

    @pytest.fixture
    def llm(self) -> BaseLLM:
        """An object under test."""
        return self.make()

    def test_no_test_is_overridden(self) -> None:
        """Every test of the suite runs, or is expected to fail with a reason.

        If this fails, take the override away, or mark it `xfail(reason=...)`.
        """
        own = {name for name in vars(LLMStandardTests) if name.startswith("test_")}
        changed = [
            name for name in own if getattr(type(self), name) is not getattr(LLMStandardTests, name)
        ]
        for name in changed:
            marks = getattr(getattr(type(self), name), "pytestmark", [])
            assert any(one.name == "xfail" and one.kwargs.get("reason") for one in marks), name

    # Making one.

    def test_init(self, llm: BaseLLM) -> None:
        """It is made from its parameters, without running the model.

        If this fails, look at the class's fields and validators.
        """
        assert isinstance(llm, self.llm_class)
        with self.watched(llm) as seen:
            self.make()
        assert seen.steps == 0

    def test_init_refuses_unknown_fields(self) -> None:
        """A field that is misspelt is an error and not ignored.

        If this fails, set `extra="forbid"` in the class's `model_config`.
        """
        with pytest.raises(ValueError, match="temprature"):
            self.make(temprature=1.0)

    def test_identity(self, llm: BaseLLM) -> None:
        """`_llm_type` is a name, and `_identifying_params` say which model answers and how.

        If this fails, caches and traces take different models for one: name in `_identifying_params` the model and
        every field that changes an answer.
        """
        assert llm._llm_type
        assert llm._identifying_params != self.make(**self.shorter)._identifying_params
        assert llm._identifying_params == self.make()._identifying_params

    def test_tracing_params(self, llm: BaseLLM) -> None:
        """LangSmith is told provider, model, temperature and limit.

        If this fails, look at `_get_ls_params` and at the names of the fields.
        """
        told = llm._get_ls_params(stop=["x"])
        assert told["ls_model_type"] == "llm"
        assert {"ls_provider", "ls_model_name", "ls_temperature", "ls_max_tokens"} <= told.keys()
        assert told["ls_stop"] == ["x"]

    # Answers.

    def test_invoke(self, llm: BaseLLM) -> None:
        """An answer is a text, and the same again where nothing is drawn.

        If this fails, see that `_generate` returns an `LLMResult` with one `Generation` a prompt, and that temperature
        0 takes the likeliest token.
        """
        answer = llm.invoke(self.prompts[0])
        assert isinstance(answer, str)
        assert answer
        assert llm.invoke(self.prompts[0]) == answer

    async def test_ainvoke(self, llm: BaseLLM) -> None:
        """The asynchronous answer is the synchronous one.

        If this fails and `test_invoke` passes, look at `_agenerate`.
        """
        assert await llm.ainvoke(self.prompts[0]) == llm.invoke(self.prompts[0])

    def test_stream(self, llm: BaseLLM) -> None:
        """A stream comes in several pieces that add up to the answer.

        If this fails, see that `_stream` yields a `GenerationChunk` for each piece as it comes, without a piece of its
        own for what a stop string or the end of text cuts off.
        """
        pieces = list(llm.stream(self.prompts[0]))
        assert all(isinstance(one, str) for one in pieces)
        assert "".join(pieces) == llm.invoke(self.prompts[0])
        assert sum(map(bool, pieces)) > 1

    async def test_astream(self, llm: BaseLLM) -> None:
        """So does an asynchronous stream.

        If this fails and `test_stream` passes, look at `_astream`.
        """
        pieces = [one async for one in llm.astream(self.prompts[0])]
        assert "".join(pieces) == llm.invoke(self.prompts[0])
        assert sum(map(bool, pieces)) > 1

    async def test_stream_events(self, llm: BaseLLM) -> None:
        """`astream_events` tells of the start, of each piece and of the end.

        If this fails, see that `_stream` calls `run_manager.on_llm_new_token` for each piece, with its chunk.
        """
        events = [one async for one in llm.astream_events(self.prompts[0], version="v2")]
        kinds = [one["event"] for one in events]
        assert (kinds[0], kinds[-1]) == ("on_llm_start", "on_llm_end")
        pieces = [one["data"]["chunk"] for one in events if one["event"] == "on_llm_stream"]
        told = "".join(getattr(one, "text", one) for one in pieces)
        assert told == llm.invoke(self.prompts[0])

    def test_batch(self, llm: BaseLLM) -> None:
        """The answers of a batch are those of its prompts alone, in order.

        If this fails, see that rows of different lengths are padded where the model does not look.
        """
        expected = [llm.invoke(one) for one in self.prompts]
        assert llm.batch(list(self.prompts)) == expected
        assert llm.batch([]) == []
        assert [one for _, one in sorted(llm.batch_as_completed(list(self.prompts)))] == expected

    async def test_abatch(self, llm: BaseLLM) -> None:
        """The same for an asynchronous batch.

        If this fails and `test_batch` passes, look at `_agenerate`.
        """
        assert await llm.abatch(list(self.prompts)) == llm.batch(list(self.prompts))
        assert await llm.abatch([]) == []

    async def test_a_batch_is_one_call(self, llm: BaseLLM) -> None:
        """All prompts of a batch reach the model in one call; `max_concurrency` bounds how many at once.

        If this fails, `_generate` answers its prompts one by one, or `batch` was overridden without passing them on
        together.
        """
        size = len(self.prompts)
        with self.watched(llm) as seen:
            llm.batch(list(self.prompts))
            await llm.abatch(list(self.prompts))
            llm.batch(list(self.prompts), {"max_concurrency": 2})
        assert seen.batches == [size, size, 2, size - 2]

    async def test_a_prompt_that_is_refused_fails_alone(self, llm: BaseLLM) -> None:
        """With `return_exceptions` a prompt that cannot be answered leaves the others their answers.

        If this fails, every prompt of the batch gets the error of one: answer the refused ones apart.
        """
        inputs = [self.prompts[0], self.unanswerable, self.prompts[1]]
        expected = [llm.invoke(self.prompts[n]) for n in (0, 1)]
        for found in (
            llm.batch(inputs, return_exceptions=True),
            await llm.abatch(inputs, return_exceptions=True),
        ):
            assert [found[0], found[2]] == expected
            assert isinstance(found[1], self.refusal)
        with pytest.raises(self.refusal):
            llm.batch(inputs)

    def test_every_form_of_input(self, llm: BaseLLM) -> None:
        """A text, a prompt value and messages all go in; a chain ends in a text.

        If this fails, see that `_convert_input` was left as it is.
        """
        text = self.prompts[0]
        value = PromptTemplate.from_template("{text}").format_prompt(text=text)
        assert llm.invoke(value) == llm.invoke(text)
        assert isinstance(llm.invoke([HumanMessage(text)]), str)
        chain = PromptTemplate.from_template("{text}") | llm | StrOutputParser()
        assert chain.invoke({"text": text}) == llm.invoke(text)

    def test_an_empty_prompt(self, llm: BaseLLM) -> None:
        """A prompt that cannot be answered is one clear error, before the model runs, however it is asked.

        If this fails, check the prompt where `_generate` and `_stream` begin.
        """
        with self.watched(llm) as seen:
            for call in (
                llm.invoke,
                lambda one: list(llm.stream(one)),
                lambda one: llm.batch([one]),
            ):
                with pytest.raises(self.refusal) as caught:
                    call(self.unanswerable)
                assert "\n" not in str(caught.value)
        assert seen.steps == 0

    def test_token_counts(self, llm: BaseLLM) -> None:
        """Tokens are counted by the model's own tokenizer, without a look at the hub.

        If this fails, give the class a `get_token_ids`.
        """
        counts = [llm.get_num_tokens(one) for one in self.prompts]
        assert llm.get_num_tokens("") == 0
        assert counts == [len(llm.get_token_ids(one)) for one in self.prompts]
        assert all(counts)

    # Parameters.

    def test_stop(self, llm: BaseLLM) -> None:
        """An answer ends before a stop string: as argument, field, bound, in a batch and in a stream.

        If this fails, see that `stop` reaches the model, that a call's goes before the field's, and that a stream
        holds back what may be the beginning of a stop string.
        """
        text = self.prompts[0]
        whole = llm.invoke(text)
        stop = [whole[len(whole) // 2 :][:2]]
        cut = whole[: whole.index(stop[0])]
        assert llm.invoke(text, stop=stop) == cut
        assert self.make(stop=stop).invoke(text) == cut
        assert self.make(stop=["never in it"]).invoke(text, stop=stop) == cut
        assert llm.bind(stop=stop).invoke(text) == cut
        assert llm.batch([text, text], stop=stop) == [cut, cut]
        assert "".join(llm.stream(text, stop=stop)) == cut

    def test_seed(self) -> None:
        """Samples differ, and a seed makes them the same again, in any order.

        If this fails, see that a seed belongs to its call, and does not set a generator that others share.
        """
        llm = self.make(**self.sampling_params)
        text = self.prompts[0]
        assert len({llm.invoke(text) for _ in range(6)}) > 1
        one, two = llm.invoke(text, seed=1), llm.invoke(text, seed=2)
        assert one != two
        assert [llm.invoke(text, seed=2), llm.invoke(text, seed=1)] == [two, one]
        assert self.make(**self.sampling_params, seed=1).invoke(text) == one
        assert "".join(llm.stream(text, seed=1)) == one

    def test_equal_prompts_draw_samples_of_their_own(self) -> None:
        """Equal prompts in a batch get samples of their own; with a seed each is the answer that it is alone.

        If this fails, rows share a generator: give each its own draws.
        """
        llm = self.make(**self.sampling_params)
        same = [self.prompts[0]] * 5
        assert len(set(llm.batch(same))) > 1
        assert set(llm.batch(same, seed=3)) == {llm.invoke(same[0], seed=3)}

    def test_bound_arguments(self, llm: BaseLLM) -> None:
        """What is bound, passed in a call, or a field, has the same effect.

        If this fails, see that `_generate` and `_stream` read their keyword arguments over the fields.
        """
        text = self.prompts[0]
        short = self.make(**self.shorter).invoke(text)
        assert short != llm.invoke(text)
        assert llm.invoke(text).startswith(short)
        assert llm.bind(**self.shorter).invoke(text) == short
        assert llm.invoke(text, **self.shorter) == short
        assert "".join(llm.bind(**self.shorter).stream(text)) == short

    def test_unknown_arguments(self, llm: BaseLLM) -> None:
        """An argument that nothing reads is an error that names it.

        If this fails, the misspelt argument of a call does nothing, silently.
        """
        with pytest.raises((ValueError, TypeError), match="temprature"):
            llm.invoke(self.prompts[0], temprature=1.0)

    def test_configurable_fields(self, llm: BaseLLM) -> None:
        """A field may be made configurable, and the copy answers with the model that is loaded.

        If this fails, see that the class can be made from its own fields, and that validators take them.
        """
        ((name, value),) = self.shorter.items()
        made = llm.configurable_fields(**{name: ConfigurableField(id="chosen")})
        text = self.prompts[0]
        assert made.invoke(text) == llm.invoke(text)
        chosen = made.with_config(configurable={"chosen": value}).invoke(text)
        assert chosen == self.make(**self.shorter).invoke(text)

    # Callbacks, usage.

    def test_callbacks(self, llm: BaseLLM) -> None:
        """Callbacks hear of the start with its prompt, of each piece of a stream, and of the end with the answer.

        If this fails, see that `_stream` calls `run_manager.on_llm_new_token` and that `_generate` returns all.
        """
        seen, text = Recorder(), self.prompts[0]
        answer = llm.invoke(text, {"callbacks": [seen], "tags": ["a"], "metadata": {"b": 1}})
        ((run, prompts, told),) = seen.starts
        assert prompts == [text]
        assert told["tags"] == ["a"]
        assert told["metadata"]["b"] == 1
        assert [(one, end.generations[0][0].text) for one, end in seen.ends] == [(run, answer)]
        streamed = Recorder()
        list(llm.stream(text, {"callbacks": [streamed]}))
        assert "".join(streamed.tokens) == answer
        assert streamed.ends[0][1].generations[0][0].text == answer

    async def test_async_callbacks(self, llm: BaseLLM) -> None:
        """Handlers that are coroutines hear of asynchronous calls.

        If this fails, look at `_agenerate` and `_astream`.
        """
        seen = AsyncRecorder()
        await llm.ainvoke(self.prompts[0], {"callbacks": [seen]})
        async for _ in llm.astream(self.prompts[0], {"callbacks": [seen]}):
            pass
        assert seen.seen == ["start", "end"] * 2

    def test_run_ids(self, llm: BaseLLM) -> None:
        """A run has the id that it was given, and each prompt of a batch one of its own.

        If this fails, see that `generate` passes `run_id` on.
        """
        seen, given = Recorder(), uuid.uuid4()
        llm.invoke(self.prompts[0], {"callbacks": [seen], "run_id": given})
        assert (seen.starts[0][0], seen.ends[0][0]) == (given, given)
        both = [uuid.uuid4(), uuid.uuid4()]
        result = llm.generate(list(self.prompts[:2]), run_id=both)
        assert [one.run_id for one in result.run or ()] == both
        seen = Recorder()
        answers = llm.batch(list(self.prompts), {"callbacks": [seen]})
        assert len({run for run, *_ in seen.starts}) == len(self.prompts)
        ends = {run: end.generations[0][0].text for run, end in seen.ends}
        assert [ends[run] for run, *_ in seen.starts] == answers

    def test_errors_reach_callbacks(self, llm: BaseLLM) -> None:
        """A call that fails is told of as an error, once, and not as an end; in a batch for that prompt alone.

        If this fails, see that errors leave `_generate` and `_stream` as they are.
        """
        seen = Recorder()
        with pytest.raises(self.refusal):
            llm.invoke(self.unanswerable, {"callbacks": [seen]})
        assert [type(one) for one in seen.errors] == [type(seen.errors[0])]
        assert isinstance(seen.errors[0], self.refusal)
        assert seen.ends == []
        seen = Recorder()
        mixed = [self.unanswerable, *self.prompts]
        llm.batch(mixed, {"callbacks": [seen]}, return_exceptions=True)
        assert (len(seen.errors), len(seen.ends)) == (1, len(self.prompts))

    def test_usage(self, llm: BaseLLM) -> None:
        """Each generation says its tokens and why it ended; the result says their sums; a stream's end says the same.

        If this fails, fill `generation_info` and `llm_output["token_usage"]` in `_generate`, and end `_stream` with a
        chunk that holds the same.
        """
        result = llm.generate(list(self.prompts))
        infos = [one[0].generation_info or {} for one in result.generations]
        counts = [llm.get_num_tokens(one) for one in self.prompts]
        assert [one["prompt_tokens"] for one in infos] == counts
        assert {one["finish_reason"] for one in infos} <= {"stop", "length"}
        usage = (result.llm_output or {})["token_usage"]
        made = sum(one["completion_tokens"] for one in infos)
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (sum(counts), made)
        assert usage["total_tokens"] == sum(counts) + made
        assert (result.llm_output or {})["model_name"]
        seen = Recorder()
        list(llm.stream(self.prompts[0], {"callbacks": [seen]}))
        assert seen.infos == [infos[0]]

    # Written out.

    @pytest.mark.filterwarnings("ignore:The function `loads?` is in beta")
    def test_serialisation(self, llm: BaseLLM) -> None:
        """What `dumpd` and `dumps` write, `load` and `loads` read, and the object is the same.

        If this fails, let `is_lc_serializable` return True, keep what is no JSON out of the fields, and let
        `get_lc_namespace` name a module from which the class can be imported.
        """
        written = dumpd(llm)
        assert written["type"] == "constructor"
        allowed = {"allowed_objects": [self.llm_class], "valid_namespaces": self.namespaces}
        for back in (load(written, **allowed), loads(dumps(llm), **allowed)):
            assert isinstance(back, self.llm_class)
            assert back._identifying_params == llm._identifying_params
            assert dumpd(back) == written
        chain = PromptTemplate.from_template("{text}") | llm
        assert "not_implemented" not in dumps(chain)

    def test_secrets_are_not_written(self) -> None:
        """A key that is given stands in nothing that is written or shown.

        If this fails, make it a `SecretStr`, name it in `lc_secrets`, or exclude the field.
        """
        llm = self.make(api_key="hidden-key")
        for text in (dumps(llm), repr(llm), str(llm.model_dump()), str(llm._identifying_params)):
            assert "hidden-key" not in text

    def test_pickle(self, llm: BaseLLM) -> None:
        """A pickled object comes back with its fields, and without the weights.

        If this fails, say in `__reduce__` how what holds the model is found again.
        """
        data = pickle.dumps(llm)
        assert pickle.loads(data)._identifying_params == llm._identifying_params
        assert len(data) < 10_000

    # A cache.

    async def test_cache(self) -> None:
        """What was answered is not answered again, in any way of asking but a stream.

        If this fails, see that `_identifying_params` are the same for equal objects.
        """
        cached = self.make(cache=InMemoryCache())
        text, more = self.prompts[0], list(self.prompts)
        with self.watched(cached) as seen:
            first = cached.invoke(text)
            assert cached.invoke(text) == await cached.ainvoke(text) == first
            assert seen.batches == [1]
            cached.batch(more)
            assert await cached.abatch(more) == cached.batch(more)
            assert seen.batches == [1, len(more) - 1]

    async def test_cache_tells_arguments_apart(self) -> None:
        """An answer with other arguments is another answer, though the prompt and the object are the same.

        If this fails, a call's arguments are no part of the cache's key: make them fields of a copy before LangChain
        computes it.
        """
        cached, text = self.make(cache=InMemoryCache()), self.prompts[0]
        whole = cached.invoke(text)
        short = self.make(**self.shorter).invoke(text)
        assert cached.invoke(text, **self.shorter) == short
        assert await cached.ainvoke(text, **self.shorter) == short
        assert cached.bind(**self.shorter).batch([text]) == [short]
        assert cached.invoke(text, stop=[whole[1]]) == whole[:1].partition(whole[1])[0]
        assert cached.invoke(text) == whole

    def test_global_cache(self) -> None:
        """LangChain's global cache is used where the object asks for it.

        If this fails, look at the field `cache`.
        """
        llm, before = self.make(cache=True), get_llm_cache()
        set_llm_cache(InMemoryCache())
        try:
            with self.watched(llm) as seen:
                assert llm.invoke(self.prompts[0]) == llm.invoke(self.prompts[0])
            assert seen.batches == [1]
        finally:
            set_llm_cache(before)

    # Many at once.

    async def test_calls_at_once(self, llm: BaseLLM) -> None:
        """Calls at the same time get the answers that they get one by one.

        If this fails, calls share state: keep it in the call.
        """
        expected = [llm.invoke(one) for one in self.prompts]
        found = await asyncio.gather(*(llm.ainvoke(one) for one in self.prompts))
        assert list(found) == expected
        mixed = await asyncio.gather(
            self._collected(llm, self.prompts[0]), llm.abatch(self.prompts[1:])
        )
        assert [mixed[0], *mixed[1]] == expected

    @pytest.mark.parametrize("way", ["ainvoke", "astream", "abatch"])
    async def test_the_event_loop_stays_free(self, llm: BaseLLM, way: str) -> None:
        """While the model works, other coroutines run.

        If this fails, the model runs in the event loop's own thread: hand it to an executor.
        """
        works: dict[str, Callable[[], Awaitable[Any]]] = {
            "ainvoke": lambda: llm.ainvoke(self.prompts[0]),
            "astream": lambda: self._collected(llm, self.prompts[0]),
            "abatch": lambda: llm.abatch(list(self.prompts)),
        }
        llm.invoke(self.prompts[0])
        with self.watched(llm, pause=0.03) as seen:
            found, seconds, longest = await beside(works[way]())
        assert found
        assert seconds > 0.03 * seen.steps > 0.1
        assert longest < seconds / 2

    # Ends.

    def test_leaving_a_stream_frees_the_model(self) -> None:
        """A stream that is closed, or dropped, stops the model within a pass or two.

        If this fails, `_stream` does not end the generation when its generator is closed: use `with` or `finally`.
        """
        llm, text = self.make(**self.long_params), self.prompts[0]
        before = llm.invoke(text, **self.shorter)
        with self.watched(llm, pause=0.02) as seen:
            stream = llm.stream(text)
            next(stream)
            stream.close()
            at = seen.steps
            assert seen.rests()
            assert seen.steps <= at + 2
            stream = llm.stream(text)
            next(stream)
            del stream
            assert seen.rests()
        assert llm.invoke(text, **self.shorter) == before

    @pytest.mark.parametrize("way", ["aclose", "cancel"])
    async def test_leaving_an_async_stream_frees_the_model(self, way: str) -> None:
        """So does an asynchronous one that is closed, or whose task is cancelled.

        If this fails and `test_leaving_a_stream_frees_the_model` passes, look at `_astream`.
        """
        llm = self.make(**self.long_params)
        with self.watched(llm, pause=0.02) as seen:
            stream = llm.astream(self.prompts[0])
            await anext(stream)
            if way == "aclose":
                await stream.aclose()  # type: ignore[attr-defined]
            else:
                await self._cancelled(self._rest(stream), seen)
            del stream
            at = seen.steps
            assert await asyncio.to_thread(seen.rests)
            assert seen.steps <= at + 3

    @pytest.mark.parametrize("way", ["ainvoke", "abatch"])
    async def test_a_cancelled_call_frees_the_model(self, way: str) -> None:
        """So does a call whose task is cancelled, which else would go on in its thread with nobody to read it.

        If this fails, `_agenerate` does not tell its thread: set an event where `CancelledError` comes.
        """
        llm, text = self.make(**self.long_params), self.prompts[0]
        with self.watched(llm, pause=0.02) as seen:
            work = llm.ainvoke(text) if way == "ainvoke" else llm.abatch(list(self.prompts))
            await self._cancelled(work, seen)
            at = seen.steps
            assert await asyncio.to_thread(seen.rests)
            assert seen.steps <= at + 2

    @staticmethod
    async def _collected(llm: BaseLLM, text: str) -> str:
        return "".join([one async for one in llm.astream(text)])

    @staticmethod
    async def _rest(stream: AsyncIterator[str]) -> int:
        return len([one async for one in stream])

    @staticmethod
    async def _cancelled(work: Awaitable[Any], seen: Watched) -> None:
        task, before = asyncio.ensure_future(work), seen.steps
        while seen.steps < before + 2 and not task.done():
            await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()


@contextlib.contextmanager
def swapped(place: Any, name: str, value: Any) -> Iterator[None]:
    """Puts another value in the place of an attribute, for a block."""
    missing = object()
    before = vars(place).get(name, missing)
    setattr(place, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(place, name)
        else:
            setattr(place, name, before)
