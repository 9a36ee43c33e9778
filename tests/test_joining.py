"""Rows that join others while these are being answered: what each gets is what it would get alone."""

import functools
import random
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

import rc_agents
from rc_agents import CoupledForCausalLM
from rc_agents import service as service_module
from rc_agents.execution import LOST
from rc_agents.service import GenerationParams, GenerationService, Guide, Request
from tests.tiny import CONTEXT, RECIPES, tiny
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny
TEXTS = [
    "The people",
    "Some of them said that the water was",
    "x",
    "12 34",
    "Where is the river now",
]
CHATS = [
    [{"role": "user", "content": "Where is the naïve 12 now?"}],
    [{"role": "system", "content": " brief"}, {"role": "user", "content": "x"}],
]
ENSEMBLES = [
    ("llama", "qwen2", "gpt2"),
    ("gemma3_text", "mistral"),  # sliding windows
    ("lfm2", "bamba"),  # convolutions, state spaces, and attention between them
    ("mamba2", "opt"),
    ("bloom", "falcon"),  # positions by distance
    ("gemma2", "gpt_neox", "phi3"),
]
OWN_TOKENS = [  # a tokenizer of its own after the colon
    ("llama", "gemma3_text:code", "qwen2"),
    ("gpt2:code", "mistral:metaspace", "lfm2:prose"),  # one of them cannot branch
    ("lfm2", "bloom:code"),
]


SCHEDULES = {ENSEMBLES[0]: "threads", ENSEMBLES[2]: "threads"}


@functools.cache
def coupled(archs, schedule="lockstep"):
    """An ensemble whose bridges speak, so that specialists and strength matter."""
    kinds = [(*arch.split(":"), "prose")[:2] for arch in archs]
    tokenizers = [tiny_tokenizer(kind) for _, kind in kinds]
    models = [
        tiny(arch, vocab_size=len(tokenizer), seed=n)
        for n, ((arch, _), tokenizer) in enumerate(zip(kinds, tokenizers, strict=True))
    ]
    names = ["medical", "code"][: len(models) - 1]
    depth = models[0].config.num_hidden_layers
    model = rc_agents.couple(
        models[0],
        dict(zip(names, models[1:], strict=True)),
        tokenizers=dict(zip(("anchor", *names), tokenizers, strict=True)),
        sites=[depth // 2, depth],
        bridge={"start": "default", "gate": "fixed"},
        schedule=schedule,
    )
    model.generation_config.eos_token_id = None
    return model


def params(**chosen):
    return GenerationParams(**{"max_new_tokens": 12, "temperature": 0.0, **chosen})


def joined(service, first, later):
    """Answers prompts, of which others join those that run after so many tokens.

    Args:
        first: pairs of prompt and parameters.
        later: (tokens, prompt, parameters) of those that join.
    """
    steps, waiting = [], [(0, *pair) for pair in first] + list(later)
    found = {}

    def joins(running):
        steps.append(running)
        due = [one for one in waiting if one[0] < len(steps)]
        for one in due:
            waiting.remove(one)
        return [asked(found, prompt, chosen) for _, prompt, chosen in due]

    service.continuous(joins)
    assert not waiting, "some were never asked for"
    return list(found.values())


def asked(found, prompt, chosen):
    """A request whose result comes under its place."""
    place = len(found)
    found[place] = None
    return Request(
        prompt=prompt, params=chosen, ended=lambda result: found.__setitem__(place, result)
    )


def same(found, alone):
    """Equal but for the last bits of probabilities."""
    assert [replace(one, tokens=()) for one in found] == [replace(one, tokens=()) for one in alone]
    for one, other in zip(found, alone, strict=True):
        for token, expected in zip(one.tokens, other.tokens, strict=True):
            assert token.token == expected.token
            assert token.logprob == pytest.approx(expected.logprob, abs=2e-4)
            assert token.contributions == pytest.approx(expected.contributions, abs=2e-4)


@pytest.mark.parametrize(
    "archs",
    [
        *ENSEMBLES[:3],
        *OWN_TOKENS[:2],
        *(pytest.param(one, marks=pytest.mark.slow) for one in ENSEMBLES[3:] + OWN_TOKENS[2:]),
    ],
    ids="+".join,
)
def test_rows_that_join_get_what_they_get_alone(archs):
    service = GenerationService(coupled(archs, schedule=SCHEDULES.get(archs, "lockstep")))
    assert service.joining_refusal() is None
    first = [
        (TEXTS[0], params(max_new_tokens=9, logprobs=0, specialists=[])),
        (TEXTS[1], params(max_new_tokens=20, logprobs=0)),
    ]
    later = [
        (1, TEXTS[2], params(max_new_tokens=17, logprobs=0, attribution=True)),
        (3, TEXTS[3], params(max_new_tokens=4, temperature=1.0, seed=5, logprobs=0)),
        (3, TEXTS[4], params(logprobs=0, specialists=["medical"], strength=0.5)),
        (12, TEXTS[1], params(max_new_tokens=30, logprobs=0)),
    ]
    alone = [service.generate(*pair) for pair in [*first, *(one[1:] for one in later)]]
    same(joined(service, first, later), alone)


def test_a_specialist_that_slept_is_there_for_a_row_that_asks_for_it():
    service = GenerationService(coupled(("llama", "qwen2", "lfm2")))
    nobody = params(specialists=[], logprobs=0, max_new_tokens=14)
    code = params(specialists=["code"], logprobs=0)
    everybody = params(logprobs=0, max_new_tokens=16)
    first, later = [(TEXTS[1], nobody)], [(2, TEXTS[2], code), (5, TEXTS[3], everybody)]
    alone = [service.generate(*pair) for pair in [*first, *(one[1:] for one in later)]]
    assert len({one.text for one in alone}) == 3
    same(joined(service, first, later), alone)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12))]
)
@pytest.mark.parametrize("archs", [("llama", "mistral", "bamba"), *OWN_TOKENS[:2]], ids="+".join)
def test_whoever_joins_whenever(archs, seed):
    service, draw = GenerationService(coupled(archs)), random.Random(seed)

    def row():
        chosen = params(
            max_new_tokens=draw.randint(1, 14),
            specialists=draw.choice([None, [], ["medical"], ["code", "medical"]]),
            temperature=draw.choice([0.0, 1.0]),
            seed=draw.randint(0, 9),
            stop=draw.choice([(), ("e",)]),
            logprobs=0,
        )
        return draw.choice(TEXTS + CHATS), chosen

    rows, found, came = [row() for _ in range(7)], {}, []

    def joins(running):
        number = draw.choice([0, 0, 1, 1, 2]) if running else 2
        new = [rows[one] for one in range(len(came), min(len(came) + number, len(rows)))]
        came.extend(new)
        return [asked(found, *pair) for pair in new]

    service.continuous(joins)
    assert came == rows
    same(found.values(), [service.generate(*pair) for pair in rows])


@pytest.fixture
def reads(monkeypatch):
    """Which calls of `generate` begin a text, and which go on from a cache."""
    found, generate = [], CoupledForCausalLM.generate

    def counted(self, **kw):
        found.append("goes on" if "past_key_values" in kw else "begins")
        return generate(self, **kw)

    monkeypatch.setattr(CoupledForCausalLM, "generate", counted)
    return found


def test_the_calls_that_answer(monkeypatch):
    """One call until somebody joins, a prompt of its own for who does, and none for a row that has ended."""
    model = coupled(("llama", "qwen2"))
    shapes, generate = [], type(model).generate

    def counted(self, **kw):
        shapes.append((*kw["input_ids"].shape, "past_key_values" in kw))
        return generate(self, **kw)

    monkeypatch.setattr(type(model), "generate", counted)
    service = GenerationService(model)
    sizes = [service.count_tokens(text) for text in ("x", TEXTS[1])]
    found = joined(
        service,
        [("x", params(max_new_tokens=3)), ("x", params(max_new_tokens=30))],
        [(6, TEXTS[1], params(max_new_tokens=5))],
    )
    assert [one.completion_tokens for one in found] == [3, 30, 5]
    together = max(sizes[0] + 6, sizes[1] + 1)
    assert shapes == [
        (2, sizes[0], False),
        (1, sizes[1], False),
        (2, together, True),
        (1, sizes[0] + 17, True),  # the other has ended, and eight tokens were computed in vain
    ]


@pytest.mark.filterwarnings("ignore:generation ends here")
def test_a_row_that_fills_a_context_in_tokens_of_that_models_own_ends_alone(reads):
    model = coupled.__wrapped__(("llama", "qwen2:code"))
    model.models["medical"].config.max_position_embeddings = 64
    service = GenerationService(model)
    first = [(TEXTS[2], params(max_new_tokens=100)), (TEXTS[1], params(max_new_tokens=100))]
    later = [
        (2, TEXTS[3], params(specialists=[], max_new_tokens=70)),  # more than there is room for
        (3, TEXTS[4], params(max_new_tokens=5)),
        (50, TEXTS[4], params(max_new_tokens=5)),
    ]
    alone = [service.generate(*pair) for pair in [*first, *(one[1:] for one in later)]]
    counts = [one.completion_tokens for one in alone]
    assert counts[2:] == [70, 5, 5]
    assert counts[1] < 64  # sixteen of 64 are kept free for the last word
    assert alone[1].finish_reason == "length"
    same(joined(service, first, later), alone)
    rows = [*first, *(one[1:] for one in later)]
    reads.clear()
    same(service.batch([text for text, _ in rows], [asked for _, asked in rows]), alone)
    assert len(reads) <= 3  # who goes on goes on together


@pytest.mark.filterwarnings("ignore:generation ends here")
def test_a_batch_without_a_cache_goes_on_where_one_row_has_filled_a_context():
    model = coupled.__wrapped__(("llama", "qwen2:code"))
    model.models["medical"].config.max_position_embeddings = 64
    model.generation_config.use_cache = False
    service = GenerationService(model)
    asked = [params(max_new_tokens=100), params(max_new_tokens=60, specialists=[])]
    alone = [service.generate(TEXTS[1], one) for one in asked]
    assert alone[0].completion_tokens < alone[1].completion_tokens == 60
    same(service.batch([TEXTS[1]] * 2, asked), alone)


def test_a_specialist_that_nobody_hears_any_more_begins_anew():
    """It misses tokens of the rows that go on without it, and is there again for the next row that asks for it."""
    service = GenerationService(coupled(("llama", "lfm2", "qwen2")))
    medical = params(specialists=["medical"], logprobs=0)
    first = [
        (TEXTS[1], params(specialists=[], max_new_tokens=30, logprobs=0)),
        (TEXTS[0], replace(medical, max_new_tokens=3)),
        (TEXTS[2], replace(medical, max_new_tokens=3)),
    ]
    later = [(10, TEXTS[3], medical), (11, TEXTS[4], params(specialists=["code"], logprobs=0))]
    alone = [service.generate(*pair) for pair in [*first, *(one[1:] for one in later)]]
    same(joined(service, first, later), alone)


def test_padding_that_nobody_needs_is_dropped(monkeypatch):
    """Rows that have ended are left out before long, and so are the columns of the longest."""
    model = coupled(("llama", "gemma3_text"))
    shapes, generate = [], type(model).generate
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, **kw: shapes.append(kw["input_ids"].shape) or generate(self, **kw),
    )
    service = GenerationService(model)
    rows = [(TEXTS[1], params(max_new_tokens=2)), ("x", params(max_new_tokens=12))]
    rows += [(TEXTS[1], params(max_new_tokens=3))]
    alone = [service.generate(*pair) for pair in rows]
    shapes.clear()
    same(joined(service, rows, []), alone)
    short = service.count_tokens("x")
    assert [*map(tuple, shapes)][1:] == [(1, short + 6)]


def test_rows_need_to_fit_the_context_alone_only(reads):
    service = GenerationService(coupled(("gpt2", "llama")))
    long = service.encode("the water " * 200).token_ids[: CONTEXT - 10]
    prompt = replace(service.encode("x"), token_ids=long)
    first = [(prompt, params(max_new_tokens=10)), ("x", params(max_new_tokens=40))]
    later = [(5, "12 34", params(max_new_tokens=60))]
    alone = [service.generate(*pair) for pair in [*first, *(one[1:] for one in later)]]
    same(joined(service, first, later), alone)
    assert [one.completion_tokens for one in alone] == [10, 40, 60]
    assert reads[-5:] == ["begins", "begins", "goes on", "goes on", "goes on"]


def test_a_row_that_a_specialists_context_has_no_room_for_ends_before_the_specialist_comes(reads):
    """Models check every row that they run on, also those that do not ask for them."""
    model = coupled.__wrapped__(("llama", "qwen2"))
    for name, room in (("anchor", 512), ("medical", 64)):
        model.models[name].config.max_position_embeddings = room
    service = GenerationService(model)
    first = [(TEXTS[0], params(max_new_tokens=100, specialists=[]))]
    later = [
        (2, TEXTS[1], params(max_new_tokens=40)),
        (3, TEXTS[2], params(max_new_tokens=5, specialists=[])),
    ]
    alone = [service.generate(*pair) for pair in [*first, *(one[1:] for one in later)]]
    reads.clear()
    same(joined(service, first, later), alone)
    assert reads == [
        "begins",
        "begins",
        "goes on",
    ]  # the last two together, when the first had ended
    assert alone[0].completion_tokens == 100


def test_a_row_that_joins_is_guided_streamed_cancelled_and_told_of():
    service = GenerationService(coupled(("llama", "qwen2")))
    cancel = threading.Event()
    pieces, ended, steps = {}, {}, []

    def request(name, cancel=None, **chosen):
        return Request(
            prompt="x",
            params=params(**chosen),
            cancel=cancel,
            sink=lambda text: pieces.setdefault(name, []).append(text),
            ended=lambda result: ended.setdefault(name, result),
        )

    def joins(running):
        steps.append(running)
        if len(steps) == 1:
            return [request("long", max_new_tokens=20)]
        if len(steps) == 2:
            guided = request("guided", guide=Guide.choice(["yes", "no"]))
            return [guided, request("left", cancel, max_new_tokens=100)]
        if len(steps) == 8:
            cancel.set()
        return []

    service.continuous(joins)
    assert [*ended] == ["guided", "left", "long"]
    assert ended["guided"].text in ("yes", "no")
    assert ended["left"].finish_reason == "cancelled"
    assert 1 < ended["left"].completion_tokens < 12
    assert ended["long"] == service.generate("x", params(max_new_tokens=20))
    assert {name: "".join(texts) for name, texts in pieces.items()} == {
        name: one.text for name, one in ended.items() if one.text
    }
    assert steps[0] == 0
    assert max(steps) == 2  # the guided one had ended with its first token


def test_a_row_that_ends_with_its_first_token_leaves_nothing_behind():
    service = GenerationService(coupled(("llama", "qwen2")))
    first, later = [(TEXTS[0], params())], [(2, TEXTS[1], params(max_new_tokens=1))]
    alone = [service.generate(*pair) for pair in [*first, *(one[1:] for one in later)]]
    same(joined(service, first, later), alone)


def test_a_time_limit_counts_from_where_a_row_joins(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    for module in (service_module.running, service_module.decoding):
        monkeypatch.setattr(module, "time", clock)
    service, ended = GenerationService(coupled(("llama", "qwen2"))), []

    def joins(running):
        now[0] += 1.0
        if now[0] not in (1.0, 10.0):
            return []
        limited = params(max_new_tokens=100, timeout=None if now[0] == 1.0 else 5.0)
        return [Request(prompt="x", params=limited, ended=ended.append)]

    service.continuous(joins)
    late, kept = ended
    assert (kept.finish_reason, kept.completion_tokens) == ("length", 100)
    assert (late.finish_reason, late.completion_tokens) == (
        "timeout",
        7,
    )  # one where it was read, one a second, and the one that was late


@pytest.mark.parametrize("when", [2, 5])
def test_rows_at_fault_fail_alone_and_the_others_are_read_again(when):
    """A model fails on one row, where it joins or later; the others get what they get alone."""
    model = coupled(("llama", "qwen2"))
    service, passes = GenerationService(model), []
    alone = [service.generate(text, params()) for text in (TEXTS[0], "x")]
    poison = service.encode(TEXTS[3]).token_ids[-1]

    def forward(module, args, kwargs):
        passes.append(kwargs["input_ids"])
        if len(passes) > when and poison in kwargs["input_ids"]:
            raise RuntimeError("inside")

    hook = model.models["medical"].register_forward_pre_hook(forward, with_kwargs=True)
    asked_bad = [(2, TEXTS[3], params(logit_bias={poison: 100}, max_new_tokens=30))]
    first, bad, last = joined(service, [(TEXTS[0], params())], [*asked_bad, (2, "x", params())])
    hook.remove()
    assert [first, last] == alone
    assert bad.finish_reason == "error"
    assert "inside" in str(bad.error)
    assert bad.completion_tokens == {2: 0, 5: 3}[when]


def test_rows_that_only_fail_together_are_answered_one_by_one(monkeypatch, reads, caplog):
    """As where memory holds each, and not all of them."""
    model, advance = coupled(("llama", "qwen2")), service_module.running.advance
    service = GenerationService(model)
    rows = [(text, params(max_new_tokens=20)) for text in TEXTS[:3]]
    alone = [service.generate(*pair) for pair in rows]

    def small(model, going, cache=None, pause=None):
        if len(going) > 1 and cache is not None:
            raise MemoryError("together")
        return advance(model, going, cache, pause)

    monkeypatch.setattr(service_module.running, "advance", small)
    reads.clear()
    same(joined(service, rows[:2], [(2, *rows[2])]), alone)
    assert (
        reads == ["begins"] * 8
    )  # two and one as they come, three to find who is at fault, three to their ends
    assert "a pass of 3 rows failed with MemoryError" in caplog.text


def test_a_row_that_goes_on_alone_is_read_again_before_it_fails(monkeypatch, reads):
    service = GenerationService(coupled(("llama", "qwen2")))
    rows = [("x", params(max_new_tokens=20)), ("12 34", params(max_new_tokens=2))]
    alone = [service.generate(*pair) for pair in rows]
    advance = service_module.running.advance

    def uncached(model, going, cache=None, pause=None):
        if cache is not None:
            raise RuntimeError("no cache")
        return advance(model, going, cache, pause)

    monkeypatch.setattr(service_module.running, "advance", uncached)
    same(joined(service, rows, []), alone)


def poisoned(kind):
    """A request that goes wrong by itself, and what is heard of it."""
    if kind == "name":
        return {"params": params(specialists=["nobody"])}, "unknown specialist 'nobody'"
    if kind == "guide":
        return {"params": params(guide=Guide.lark("start: <|foo|>"))}, "foo"

    def begun():
        raise RuntimeError("scoring failed")

    return {"params": params(), "begun": begun}, "scoring failed"


@pytest.mark.parametrize("kind", ["name", "guide", "begun"])
def test_a_request_that_cannot_be_answered_ends_alone(kind):
    service, found, told = GenerationService(coupled(("llama", "qwen2"))), {}, []
    wrong, message = poisoned(kind)
    turns = iter([[asked(found, "x", params())], [], "wrong"])

    def joins(running):
        new = next(turns, [])
        if new == "wrong":
            return [Request(prompt="x", ended=told.append, **wrong), asked(found, "12", params())]
        return new

    service.continuous(joins)
    same(found.values(), [service.generate("x", params()), service.generate("12", params())])
    (bad,) = told
    assert bad.finish_reason == "error"
    assert message in str(bad.error)


def test_what_a_callback_raises_is_the_callers_when_all_were_told():
    service, told = GenerationService(coupled(("llama", "qwen2"))), []

    def fails(result):
        told.append("first")
        raise ValueError("the caller's own")

    requests = [
        Request(prompt="x", params=params(max_new_tokens=4), ended=fails),
        Request(
            prompt="12", params=params(max_new_tokens=4), ended=lambda one: told.append("second")
        ),
        Request(
            prompt="x", params=params(max_new_tokens=40), ended=lambda one: told.append("third")
        ),
    ]
    with pytest.raises(ValueError, match="the caller's own"):
        service.continuous(lambda running: [] if running else [requests.pop() for _ in [*requests]])
    assert sorted(told) == ["first", "second"]


@pytest.mark.parametrize(
    "options",
    [
        {"bridge": {"kind": "moe"}},
        {"mix": "average", "bridge": {"start": "default", "gate": "fixed"}},
    ],
    ids=["router", "mixed"],
)
def test_routers_and_mixers_are_joined_too(options):
    size, tokenizer = len(tiny_tokenizer("prose")), tiny_tokenizer("prose")
    anchor, medical = (tiny(arch, vocab_size=size, width=32) for arch in ("llama", "qwen2"))
    tokenizers = dict.fromkeys(("anchor", "medical"), tokenizer)
    model = rc_agents.couple(anchor, {"medical": medical}, tokenizers=tokenizers, **options)
    model.generation_config.eos_token_id = None
    service = GenerationService(model)
    first, later = [(TEXTS[1], params(logprobs=0))], [(3, "x", params(logprobs=0))]
    later += [(4, TEXTS[0], params(logprobs=0, specialists=[]))]
    alone = [service.generate(*pair) for pair in [*first, *(one[1:] for one in later)]]
    same(joined(service, first, later), alone)


def test_what_an_earlier_batch_lost_is_not_told_again():
    service = GenerationService(coupled(("llama", "qwen2")))
    LOST.set({"far": "gone"})  # as after a batch over nodes
    (found,) = joined(service, [("x", params())], [])
    assert found.lost == {}


def refused(kind):
    model = coupled.__wrapped__(("llama", "qwen2"))
    if kind == "static":
        model.generation_config.cache_implementation = "static"
    if kind == "dynamic":
        model.generation_config.cache_implementation = "dynamic"
    if kind == "uncached":
        model.generation_config.use_cache = False
    if kind == "counting":
        model.generation_config.min_new_tokens = 1
    return model


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("static", "the generation config asks for static cache"),
        ("dynamic", "the generation config asks for dynamic cache"),
        ("uncached", "the generation config asks for no cache"),
        ("counting", "the generation config sets min_new_tokens, counted from where a call begins"),
    ],
)
def test_where_rows_cannot_join_it_is_said(kind, reason):
    service = GenerationService(refused(kind))
    assert service.joining_refusal() == reason
    with pytest.raises(rc_agents.RCError, match=f"{reason}; use batch"):
        service.continuous(lambda running: [])


def test_every_tiny_architecture_can_be_joined():
    for arch in RECIPES:
        model = rc_agents.couple(tiny(arch, vocab_size=len(tiny_tokenizer("prose"))), {})
        assert rc_agents.service.joining.refusal(model) is None, arch


def test_sparse_rows_are_not_joined():
    model = coupled(("llama", "qwen2"))
    service = GenerationService(model)
    with model.sparse():
        assert service.joining_refusal() == "specialists sleep"
