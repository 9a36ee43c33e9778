"""The generation service: one path for single calls, batches and streams."""

import asyncio
import gc
import logging
import resource
import threading
import time
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

import rc_agents
from rc_agents.errors import InputError
from rc_agents.service import (
    CHOICES,
    LIMITS,
    GenerationParams,
    GenerationService,
    Prompt,
    TextStream,
    load,
    settings_over,
    unblocked,
)
from rc_agents.service.reading import RowReader
from tests.tiny import CONTEXT, saved, tiny
from tests.tiny_tokenizers import EOS, KINDS, tiny_tokenizer

pytestmark = pytest.mark.tiny
CHAT = [{"role": "user", "content": "Where is the river?"}]
TEXTS = ["The people", "Some of them said that the water", "x", "naïve 🙂", "12 34"]


def coupled(kind="prose", anchor="llama", anchor_kind="prose"):
    """An ensemble whose bridges speak, so that specialists and strength matter."""
    torch.manual_seed(0)  # of the bridges
    tokenizers = {"anchor": tiny_tokenizer(anchor_kind), "medical": tiny_tokenizer(kind)}
    models = {
        name: tiny(arch, vocab_size=len(tokenizers[name]), seed=seed)
        for seed, (name, arch) in enumerate({"anchor": anchor, "medical": "qwen2"}.items())
    }
    model = rc_agents.couple(
        models["anchor"],
        {"medical": models["medical"]},
        tokenizers=tokenizers,
        bridge={"start": "default", "gate": "fixed"},
    )
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def model():
    return coupled()


@pytest.fixture(scope="module")
def service(model):
    return GenerationService(model)


def params(**chosen):
    return GenerationParams(**{"max_new_tokens": 12, **chosen})


# One path.


def test_greedy_text_is_what_the_model_generates(model, service):
    ids = model.tokenizer(TEXTS[0], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    new = out[0, ids["input_ids"].shape[1] :]
    result = service.generate(TEXTS[0], params())
    assert result.text == model.tokenizer.decode(new, skip_special_tokens=True)
    assert (result.prompt_tokens, result.completion_tokens) == (ids["input_ids"].shape[1], 12)
    assert result.finish_reason == "length"


@pytest.mark.parametrize("chosen", [{"top_k": 0}, {"top_k": 7}, {"top_k": 0, "top_p": 0.7}])
def test_samples_are_those_of_generate_with_the_seed(model, service, chosen):
    ids = model.tokenizer(TEXTS[1], return_tensors="pt")
    sampled = {"do_sample": True, "temperature": 0.8, "seed": 5, **chosen}
    out = model.generate(**ids, max_new_tokens=12, **sampled)
    expected = model.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert service.generate(TEXTS[1], params(temperature=0.8, seed=5, **chosen)).text == expected


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_batch_equals_singles_with_everything_chosen_by_row(kind):
    service = GenerationService(coupled(kind))
    chosen = [
        params(),
        params(specialists=[], max_new_tokens=5),
        params(temperature=1.0, seed=7, strength=0.5),
        params(temperature=0.5, top_k=5, top_p=0.9, seed=3, strength={"medical": 2.0}),
        params(stop=["a", "e"], specialists=["medical"]),
    ]
    singles = [service.generate(*pair) for pair in zip(TEXTS, chosen, strict=True)]
    assert service.batch(TEXTS, chosen) == singles
    assert len({one.text for one in singles}) == len(singles)


def test_a_batch_is_one_generate_call(model, service, monkeypatch):
    calls = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, **kw: calls.append(kw["input_ids"].shape) or generate(self, **kw),
    )
    service.batch([CHAT, "The river", service.encode("x")], params())
    assert len(calls) == 1
    assert calls[0][0] == 3


def test_one_seed_counts_up_over_the_rows(service):
    chosen = params(temperature=1.0, seed=11)
    rows = service.batch([TEXTS[0]] * 3, chosen)
    assert rows == [
        service.generate(TEXTS[0], params(temperature=1.0, seed=n)) for n in (11, 12, 13)
    ]
    assert len({row.text for row in rows}) == 3


def test_samples_without_a_seed_differ_and_follow_torchs_seed(service):
    first, second = (service.generate("x", params(temperature=1.0)).text for _ in range(2))
    torch.manual_seed(0)
    assert first != second
    assert service.generate("x", params(temperature=1.0)).text == first


def test_specialists_and_strength_reach_the_model(model, service):
    alone = service.generate("The", params(specialists=[]))
    with model.disabled():
        assert service.generate("The", params()) == alone
    assert service.generate("The", params()) != alone
    assert service.generate("The", params(strength=0.0)) == alone


def test_rows_that_do_not_fit_side_by_side_run_one_by_one(service):
    long = Prompt((40,) * (CONTEXT - 10))
    chosen = [params(max_new_tokens=10), params(max_new_tokens=200)]
    singles = [service.generate(*pair) for pair in zip([long, "x"], chosen, strict=True)]
    assert service.batch([long, "x"], chosen) == singles


def test_nothing_to_answer(service):
    assert service.batch([]) == []


def test_the_models_own_generation_config_is_the_default():
    model = coupled()
    service = GenerationService(model)
    greedy = service.generate("The", params(max_new_tokens=6))
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=9, max_new_tokens=6)
    result = service.generate("The", GenerationParams(seed=2))
    assert result.completion_tokens == 6
    chosen = GenerationParams(temperature=0.7, top_k=9, max_new_tokens=6, seed=2)
    assert result == service.generate("The", chosen)
    assert service.generate("The", GenerationParams(temperature=0.0)) == greedy


def test_nothing_is_logged(service, caplog):
    service.model.generation_config.max_length = 20
    try:
        with caplog.at_level(logging.WARNING):
            service.batch(TEXTS, params(temperature=0.7, seed=1))
    finally:
        service.model.generation_config.max_length = None
    assert not caplog.records


def test_padding_falls_back_to_the_end_token():
    model = coupled()
    expected = GenerationService(model).batch(TEXTS, params())
    tokenizer = model.tokenizer
    tokenizer.pad_token, pad = None, tokenizer.pad_token
    kept, model.generation_config.pad_token_id = model.generation_config.pad_token_id, None
    try:
        assert GenerationService(model).batch(TEXTS, params()) == expected
        model.generation_config.pad_token_id = 10_000  # an id that the anchor does not embed
        assert GenerationService(model).batch(TEXTS, params()) == expected
    finally:
        tokenizer.pad_token, model.generation_config.pad_token_id = pad, kept


# Ends.


def forced(model, monkeypatch, ids):
    """Makes a model's next tokens those given, then the first again."""
    generate = type(model).generate

    def forcing(self, **kwargs):
        width = kwargs["input_ids"].shape[1]

        def force(input_ids, scores):
            wanted = ids[min(input_ids.shape[1] - width, len(ids) - 1)]
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([wanted]), 0.0)

        return generate(self, **kwargs | {"logits_processor": [force]})

    monkeypatch.setattr(type(model), "generate", forcing)


def test_the_end_token_ends_the_text(model, service, monkeypatch):
    tokens = model.tokenizer("the water", add_special_tokens=False)["input_ids"]
    forced(model, monkeypatch, [*tokens, EOS])
    result = service.generate("x", params())
    assert (result.text, result.finish_reason) == ("the water", "stop")
    assert result.completion_tokens == len(tokens) + 1


@pytest.mark.parametrize(
    ("stop", "expected", "reason"),
    [
        ("er of", "the wat", "stop"),
        (["zzz", " "], "the", "stop"),
        (["t"], "", "stop"),
        (["thf", "the n", "naï"], "the water of ", "stop"),
        (["🙂"], "the water of the naïve ", "stop"),
        (["everx", "naïve 🙂 everything"], "the water of the naïve 🙂 ever", "length"),
    ],
)
def test_stop_strings_are_cut_also_across_tokens(
    model, service, monkeypatch, stop, expected, reason
):
    whole = "the water of the naïve 🙂 ever"
    tokens = model.tokenizer(whole, add_special_tokens=False)["input_ids"]
    forced(model, monkeypatch, tokens)
    chosen = params(stop=stop, max_new_tokens=len(tokens))
    result = service.generate("x", chosen)
    assert (result.text, result.finish_reason) == (expected, reason)
    with service.stream("x", chosen) as stream:
        assert "".join(stream) == expected
    assert stream.result == result


def test_text_goes_on_from_plain_text_with_its_space_and_starts_anew_in_a_chat(monkeypatch):
    service = GenerationService(coupled("metaspace", anchor_kind="metaspace"))
    tokens = service.model.tokenizer("the water", add_special_tokens=False)["input_ids"]
    forced(service.model, monkeypatch, [*tokens, EOS])
    assert service.generate("Higher than", params()).text == " the water"
    assert service.generate(CHAT, params()).text == "the water"


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=30))
def test_a_reader_gives_the_text_that_was_tokenized(kind, text):
    tokenizer = tiny_tokenizer(kind)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = RowReader(tokenizer, 10_000, [EOS])
    pieces = [reader.push(token) for token in tokens] + [reader.finish("length")]
    assert "".join(pieces) == reader.text
    assert reader.text == tokenizer.decode(tokens, skip_special_tokens=True)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "\N{REPLACEMENT CHARACTER}" not in reader.text


@given(
    text=st.text(alphabet="ab é🙂", max_size=20),
    stop=st.lists(st.text(alphabet="ab é🙂", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_where_a_text_stops_does_not_depend_on_its_tokens(text, stop):
    """Byte by byte, and in any tokens: the same cut."""
    tokenizer = tiny_tokenizer("code")
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    letters = bytes_to_unicode()
    singles = tokenizer.convert_tokens_to_ids([letters[byte] for byte in text.encode()])
    texts = set()
    for tokens in (whole, singles):
        reader = RowReader(tokenizer, 10_000, [EOS], stop)
        for token in tokens:
            reader.push(token)
            if reader.finish_reason:
                break
        reader.finish("length")
        texts.add(reader.text)
    assert len(texts) == 1
    assert not any(one in texts.copy().pop() for one in stop)


def test_a_time_limit_ends_a_row_with_what_it_has(service):
    result = service.generate("x", GenerationParams(max_new_tokens=200, timeout=1e-6))
    assert result.finish_reason == "timeout"
    assert result.completion_tokens == 1


def test_cancelling_ends_all_rows(service):
    cancel = threading.Event()
    cancel.set()
    results = service.batch(["x", "y"], params(), cancel=cancel)
    assert [(one.finish_reason, one.completion_tokens) for one in results] == [("cancelled", 0)] * 2
    cancel.clear()
    stream = service.stream("x", params(max_new_tokens=200), cancel=cancel)
    next(stream)
    cancel.set()
    list(stream)
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.completion_tokens < 200


# Streams.


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_the_same_text_in_whole_characters(kind):
    service = GenerationService(coupled(kind, anchor_kind=kind))
    for prompt in (TEXTS[3], CHAT):
        chosen = params(max_new_tokens=28, temperature=1.0, seed=1)
        stream = service.stream(prompt, chosen)
        pieces = list(stream)
        result = service.generate(prompt, chosen)
        assert "".join(pieces) == result.text
        assert stream.result == result
        assert all(pieces)


def test_closing_a_stream_stops_within_one_token(service):
    steps = []
    real = service.model.forward
    service.model.forward = lambda *a, **kw: (time.sleep(0.01), steps.append(1), real(*a, **kw))[2]
    try:
        stream = service.stream("The people", params(max_new_tokens=200))
        next(stream)
        seen = len(steps)
        stream.close()
        assert len(steps) <= seen + 2
        assert stream.result.finish_reason == "cancelled"
        assert list(stream) == []
        stream.close()
    finally:
        del service.model.forward


def test_a_stream_can_be_closed_from_another_thread(service):
    stream = service.stream("The people", params(max_new_tokens=200))
    reader = threading.Thread(target=list, args=(stream,))
    reader.start()
    stream.close()
    reader.join(10)
    assert not reader.is_alive()
    assert stream.result.finish_reason == "cancelled"


def test_a_stream_is_read_without_holding_up_the_event_loop(service):
    chosen = params(max_new_tokens=5)

    async def pieces(items):
        return [piece async for piece in unblocked(items)]

    async def meanwhile():
        go = threading.Event()
        asyncio.get_running_loop().call_later(0.1, go.set)
        return await pieces(go.wait(20) for _ in range(1))

    with service.stream("x", chosen) as stream:
        found = asyncio.run(pieces(stream))
    assert "".join(found) == service.generate("x", chosen).text
    assert len(found) > 1
    assert asyncio.run(meanwhile()) == [True]  # set while it waited


def test_a_dropped_stream_ends_its_thread(service):
    before = set(threading.enumerate())  # some of which may end meanwhile
    stream = service.stream("The people", params(max_new_tokens=240))
    next(stream)
    begun = set(threading.enumerate()) - before
    assert begun
    del stream
    gc.collect()
    deadline = time.monotonic() + 5
    while any(one.is_alive() for one in begun) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(one.is_alive() for one in begun)


def test_a_stream_holds_the_callers_context(model, service):
    expected = service.generate("The people", params(specialists=[]))
    with model.disabled():
        stream = service.stream("The people", params())
    list(stream)
    assert stream.result == expected


def test_a_stream_raises_what_the_generation_raised(service, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(type(service.model), "generate", fail)
    stream = service.stream("x", params())
    with pytest.raises(RuntimeError, match="no memory left"):
        next(stream)
    with pytest.raises(RuntimeError, match="no memory left"):
        _ = stream.result
    assert list(stream) == []


def test_a_stream_has_no_result_before_its_end(service):
    stream = service.stream("x", params(max_new_tokens=100))
    with stream, pytest.raises(InputError, match="no result yet"):
        _ = stream.result


def test_four_threads_get_the_answers_of_one(service):
    chosen = [params(temperature=1.0, seed=n, max_new_tokens=20) for n in range(4)]
    expected = [service.generate(TEXTS[n], chosen[n]) for n in range(4)]
    found = [None] * 4

    def work(n):
        stream = service.stream(TEXTS[n], chosen[n])
        text = "".join(stream)
        assert text == stream.result.text
        found[n] = stream.result

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# Prompts and bad input.


def test_a_chat_is_rendered_by_the_anchors_template(service):
    prompt = service.render(CHAT)
    text = service.model.tokenizer.decode(prompt.token_ids)
    assert text == "<|im_start|>user\nWhere is the river?<|im_end|>\n<|im_start|>assistant\n"
    assert service.count_tokens(CHAT) == len(prompt.token_ids)
    assert service.count_tokens("") == 0
    headers = GenerationService(coupled("code", anchor_kind="code"))
    ids = headers.render(CHAT).token_ids
    assert ids.count(1) == 1  # the template's own bos, and no second


BAD_PROMPTS = [
    ("", "a prompt is a text of at least one character, got ''"),
    ([], "a chat is a list of at least one message, got []"),
    (7, "a chat is a list of at least one message, got 7"),
    (["Hi"], "a message is a dict with a role and a content, both strings, got 'Hi'"),
    ([{"role": "user"}], "a message is a dict with a role and a content"),
    ([{"role": "user", "content": None}], "a message is a dict with a role and a content"),
    (Prompt((40,) * 256), "the prompt has 256 tokens and model 'anchor' takes at most 256"),
    (
        Prompt((40,) * 250),
        "the prompt has 250 tokens and max_new_tokens=12, together 262, but model 'anchor' takes at most 256",
    ),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_a_prompt_that_cannot_work_says_why(service, prompt, message):
    for call in (
        service.generate,
        service.stream,
        lambda one, chosen: service.batch(["x", one], chosen),
    ):
        with pytest.raises(InputError) as caught:
            call(prompt, params())
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_empty_prompt_cannot_be_made():
    with pytest.raises(InputError, match="at least one token"):
        Prompt(())


def test_the_answer_ends_at_the_context_where_no_length_is_asked_for(service):
    result = service.generate(Prompt((40,) * 250))
    assert (result.completion_tokens, result.finish_reason) == (6, "length")


BAD_PARAMS = [
    ({"max_new_tokens": 0}, "max_new_tokens is an integer of at least 1, got 0"),
    ({"max_new_tokens": 1.5}, "max_new_tokens is an integer of at least 1, got 1.5"),
    ({"max_new_tokens": True}, "max_new_tokens is an integer of at least 1, got True"),
    ({"temperature": -1}, "temperature is a finite number of at least 0, got -1"),
    ({"temperature": float("nan")}, "temperature is a finite number of at least 0, got nan"),
    ({"temperature": "hot"}, "temperature is a finite number of at least 0, got 'hot'"),
    ({"top_p": 0}, "top_p is a finite number above 0 and at most 1, got 0"),
    ({"top_p": 1.1}, "top_p is a finite number above 0 and at most 1, got 1.1"),
    ({"top_k": -1}, "top_k is an integer of at least 0, got -1"),
    ({"seed": 0.5}, "seed is an integer, got 0.5"),
    ({"timeout": 0}, "timeout is a finite number above 0, got 0"),
    ({"stop": ""}, "stop is a string or a list of strings, none of them empty, got ''"),
    ({"stop": ["a", 3]}, "stop is a string or a list of strings, none of them empty"),
    ({"specialists": "medical"}, "specialists is a list of names, got 'medical'"),
    ({"specialists": [None]}, "specialists is a list of names, got [None]"),
    (
        {"strength": "high"},
        "strength is a finite number or a dict of them by specialist, got 'high'",
    ),
    ({"strength": {"medical": float("inf")}}, "strength is a finite number"),
]


def test_params_are_taken_out_of_a_frameworks_settings():
    names = {field.name for field in fields(GenerationParams)}
    assert {*CHOICES} <= names
    settings = {"temperature": 0.5, "stop": "x", "seed": None, "verbose": True, "tools": []}
    assert GenerationParams.of(settings) == GenerationParams(temperature=0.5, stop="x")
    for name in LIMITS:
        assert GenerationParams.of({name: 3, "top_k": 2}) == GenerationParams(
            max_new_tokens=3, top_k=2
        )
    both = GenerationParams.of({"max_tokens": 3, "max_new_tokens": 4, "top_p": 0.5}, top_p=None)
    assert both == GenerationParams(max_new_tokens=3)
    with pytest.raises(InputError, match="top_p"):
        GenerationParams.of({"top_p": 3})
    kept = GenerationParams.of({"top_k": 2, "tools": [], "user": None, "n": None}, others=["tools"])
    assert kept == GenerationParams(top_k=2)
    with pytest.raises(InputError, match=r"no option 'max_token'.*did you mean 'max_tokens'\?"):
        GenerationParams.of({"max_token": 3}, others=["tools"])


def test_a_calls_settings_go_over_the_objects_own():
    own = {"max_tokens": 100, "top_k": 2}
    assert settings_over(own, {"max_new_tokens": 5}) == {"max_new_tokens": 5, "top_k": 2}
    assert settings_over(own, {"max_new_tokens": None, "top_k": 3})["max_tokens"] == 100
    assert settings_over(own, {}) == own


async def test_leaving_a_stream_leaves_the_event_loop_alone():
    """A task that is cancelled ends its generation; meanwhile others go on."""
    inside, go, ticks = threading.Event(), threading.Event(), []

    def run(put, closed):
        inside.set()
        go.wait(20)
        return "done"

    async def read():
        async with TextStream(run) as stream:
            async for _ in unblocked(stream):
                pass

    task = asyncio.create_task(read())
    await asyncio.to_thread(inside.wait, 20)
    task.cancel()
    for _ in range(20):
        ticks.append(task.done())
        await asyncio.sleep(0.001)
    assert not any(ticks)  # it waits for the generation, and we do not
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_bias_has_numbers_or_their_digits_for_tokens():
    plain = GenerationParams(logit_bias={5: -1.0})
    assert GenerationParams(logit_bias={"5": -1.0}) == plain
    for wrong in ({"river": 1.0}, {-1: 1.0}, [5], {5: None}, {None: 1.0}, {"5": 1.0, 5: 2.0}):
        with pytest.raises(InputError, match="logit_bias"):
            GenerationParams(logit_bias=wrong)


@pytest.mark.parametrize(("chosen", "message"), BAD_PARAMS)
def test_params_that_cannot_work_say_why(chosen, message):
    with pytest.raises(InputError) as caught:
        GenerationParams(**chosen)
    assert message in str(caught.value)


@pytest.mark.parametrize("chosen", [{"specialists": ["medicine"]}, {"strength": {"medicine": 1}}])
def test_an_unknown_specialist_is_refused_before_anything_runs(service, chosen):
    with pytest.raises(InputError, match="unknown specialist 'medicine'; known: medical"):
        service.stream("x", params(**chosen))


def test_wrong_counts_and_types_are_refused(service, model):
    with pytest.raises(InputError, match="params has 1 entries for 2 prompts"):
        service.batch(["x", "y"], [params()])
    with pytest.raises(InputError, match="a batch is a list of prompts, got str"):
        service.batch("x")
    with pytest.raises(InputError, match="params is a GenerationParams, got dict"):
        service.batch(["x"], [{"max_new_tokens": 3}])
    with pytest.raises(InputError, match="needs an ensemble, got LlamaForCausalLM"):
        GenerationService(model.models["anchor"])
    with pytest.raises(InputError, match="the anchor has no tokenizer"):
        GenerationService(rc_agents.couple(tiny("llama")))


def test_a_template_that_refuses_or_is_missing_says_so():
    service = GenerationService(coupled())
    tokenizer = service.model.tokenizer
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
            service.render(CHAT)
        tokenizer.chat_template = None
        with pytest.raises(InputError, match="has no chat template"):
            service.render(CHAT)
    finally:
        tokenizer.chat_template = kept


# Loading by name.


def test_load_takes_an_ensemble_or_a_single_model(tmp_path):
    base = saved(tmp_path, "llama", "prose")
    single = load(base)
    assert single.names == ["anchor"]
    ensemble = rc_agents.couple(str(base), {"medical": str(base)})
    ensemble.save_pretrained(tmp_path / "ensemble")
    assert load(tmp_path / "ensemble").names == ["anchor", "medical"]
    assert load(str(base), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(rc_agents.RCError) as caught:
        load(tmp_path / "nothing")
    assert "nothing" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_thousand_short_requests_leave_nothing_behind(service):
    def request(n):
        if n % 3 == 0:
            service.generate("x", params(max_new_tokens=3, temperature=1.0))
        elif n % 3 == 1:
            with service.stream("x", params(max_new_tokens=200)) as stream:
                next(stream)
        else:
            service.batch(["x", "The river"], params(max_new_tokens=2, stop=["a"]))

    for n in range(100):
        request(n)
    gc.collect()
    threads, tensors, memory = threading.active_count(), _tensors(), _peak_memory()
    for n in range(1000):
        request(n)
    gc.collect()
    assert threading.active_count() <= threads
    assert _tensors() <= tensors + 5
    assert _peak_memory() - memory < 20_000


def _peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux


def _tensors():
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
