"""Guided answers, tools, and reading calls back."""

import json
import subprocess
import sys
from itertools import pairwise

import llguidance
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rc_agents.errors import InputError
from rc_agents.service import GenerationParams, GenerationService, Guide, ToolCall, running
from rc_agents.service.guides import KEPT, Guiding, Vocabulary
from rc_agents.service.tools import CallReader, Tool, closed, read_call, read_choice, write_call
from tests.ensembles import talking

pytestmark = pytest.mark.tiny
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city"],
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather", "parameters": SCHEMA},
}
DEEP = {"type": "integer"}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}
CLOCK = {"type": "function", "function": {"name": "clock"}}
USER = [{"role": "user", "content": "How is the weather in Rome?"}]
# A chat template that shows tools and calls itself, as Qwen's does.
NATIVE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments.city }}"
    "{% endfor %}\n{% endfor %}assistant: "
)


@pytest.fixture(scope="module")
def service():
    return GenerationService(talking("medical"))


def answer(service, conversation, tokens=120, **more):
    params = conversation.params(GenerationParams(max_new_tokens=tokens, **more))
    return service.generate(conversation.prompt, params)


# Guides.


@pytest.mark.parametrize(
    ("guide", "fits"),
    [
        (Guide.choice(["yes", "no", "I don't know"]), {"yes", "no", "I don't know"}.__contains__),
        (Guide.regex("[0-9]{3}-[a-c]{2}"), lambda text: text[:3].isdigit() and text[3] == "-"),
        (Guide.json_schema(closed(SCHEMA)), lambda text: json.loads(text)["city"] in "Paris Rome"),
        (Guide.lark('start: "a" ("b" | "c")~3'), lambda text: len(text) == 4 and text[0] == "a"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_guided_answer_keeps_to_its_form_and_ends_there(service, guide, fits, temperature):
    params = GenerationParams(guide=guide, temperature=temperature, seed=3, max_new_tokens=80)
    found = service.generate("The river", params)
    assert fits(found.text.strip())
    assert found.finish_reason == "stop"
    assert found.completion_tokens < 80


def test_rows_of_a_batch_are_guided_each_by_its_own(service):
    guides = [Guide.choice(["one", "two"]), None, Guide.regex("z{5}")]
    params = [GenerationParams(guide=guide, max_new_tokens=9) for guide in guides]
    found = service.batch(["The river", "The town", "The hill"], params)
    assert found[0].text in ("one", "two")
    assert found[2].text == "zzzzz"
    assert found[1] == service.generate("The town", GenerationParams(max_new_tokens=9))


def test_a_guided_answer_that_is_cut_says_so(service):
    params = GenerationParams(guide=Guide.regex("z{50}"), max_new_tokens=5)
    found = service.generate("The", params)
    assert (found.finish_reason, set(found.text)) == ("length", {"z"})
    whole = GenerationParams(guide=Guide.regex("z{3}"), max_new_tokens=3)
    assert service.generate("The", whole).finish_reason == "stop"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guide.json_schema({"type": "wrong"}), "Invalid type: wrong"),
        (lambda: Guide.json_schema("object"), "a JSON schema is a dict"),
        (lambda: Guide.regex("("), "no answer can be guided"),
        (lambda: Guide.lark("start: nothing"), "no answer can be guided"),
        (lambda: Guide.choice([]), "a choice is a list of texts"),
        (lambda: GenerationParams(guide="yes|no"), "guide is a Guide"),
    ],
)
def test_a_guide_that_cannot_work_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.slow
def test_without_llguidance_the_message_says_what_to_install():
    code = "import sys; sys.modules['llguidance'] = None\n"
    code += "from rc_agents.service import Guide; Guide.choice(['a'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().endswith("run: pip install 'rc-agents[structured]'")


# Tools.


@pytest.mark.parametrize(
    "choice", ["required", "any", True, "weather", {"function": {"name": "weather"}}]
)
def test_a_wanted_call_names_a_tool_and_keeps_to_its_schema(service, choice):
    talk = service.converse(USER, tools=[WEATHER], tool_choice=choice)
    found = answer(service, talk)
    reply = talk.read(found.text)
    (call,) = reply.tool_calls
    assert (call.name, reply.content) == ("weather", "")
    assert call.arguments["city"] in ("Paris", "Rome")
    assert call.arguments.keys() <= {"city", "days"}
    assert json.loads(call.text) == call.arguments
    assert found.finish_reason == "stop"


def test_a_named_tool_is_the_one_that_is_called(service):
    talk = service.converse(USER, tools=[WEATHER, CLOCK], tool_choice="clock")
    (call,) = talk.read(answer(service, talk).text).tool_calls
    assert (call.name, call.arguments) == ("clock", {})


def test_several_calls_only_where_they_are_allowed(service):
    tokenizer = service.model.tokenizer
    known = Vocabulary(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    one = write_call("clock", {})
    for several in (False, True):
        talk = service.converse(
            USER, tools=[CLOCK], tool_choice="required", parallel_tool_calls=several
        )
        guiding = Guiding(known, talk.guide)
        for token in tokenizer(one, add_special_tokens=False).input_ids:
            assert guiding.allowed(len(tokenizer))[token]
            guiding.push(token)
        assert guiding.ended is not several
    calls = talk.read(f"{one}\n{one}").tool_calls
    assert calls == (ToolCall("clock", {}, "{}"),) * 2
    assert calls[0].id != calls[1].id


def test_no_tools_are_told_where_none_may_be_called(service):
    plain = service.render(USER)
    talk = service.converse(USER, tools=[WEATHER], tool_choice="none")
    assert talk.prompt == plain
    assert talk.guide is None
    assert service.converse(USER, tools=[]).prompt == plain
    assert talk.read("<tool_call>x</tool_call>").content == "<tool_call>x</tool_call>"


def test_with_auto_an_answer_may_be_plain_text(service):
    talk = service.converse(USER, tools=[WEATHER])
    found = answer(service, talk, 8)
    assert talk.read(found.text).content == found.text
    text = service.model.tokenizer.decode(talk.prompt.token_ids)
    assert '"name": "weather"' in text
    assert "<tool_call>" in text


def test_calls_and_results_are_written_for_a_template_that_knows_no_tools(service):
    call = {"id": "c1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Rome"}'}
    turns = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c1", "content": "dry"},
    ]
    text = service.model.tokenizer.decode(service.converse(turns, tools=[WEATHER]).prompt.token_ids)
    assert text.count(write_call("weather", {"city": "Rome"})) == 2
    first, second = (f"<tool_response>\n{one}\n</tool_response>" for one in ("sunny", "dry"))
    assert f"{first}\n{second}" in text


def test_a_template_that_knows_tools_gets_them_in_its_own_form(service, monkeypatch):
    monkeypatch.setattr(service.model.tokenizer, "chat_template", NATIVE)
    call = {"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [*USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "dry"}]
    text = service.model.tokenizer.decode(service.converse(turns, tools=[WEATHER]).prompt.token_ids)
    assert text.startswith("TOOLS [{")
    assert "assistant: CALL weather Rome" in text
    assert "tool: dry" in text
    assert "You may call these functions" not in text


def test_a_wanted_form_is_told_and_kept(service):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    talk = service.converse(
        [{"role": "system", "content": "Be brief."}, *USER], response_format=form
    )
    assert json.loads(answer(service, talk).text)["city"] in ("Paris", "Rome")
    text = service.model.tokenizer.decode(talk.prompt.token_ids)
    assert "Be brief.\n\nAnswer with JSON of this schema" in text
    free = service.converse(USER, response_format={"type": "json_object"})
    assert answer(service, free, 5).text.startswith("{")
    assert service.converse(USER, response_format={"type": "text"}).prompt == service.render(USER)


FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}


def follows(guiding, tokenizer, text):
    """Whether a guide allows every token of a text."""
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        if not guiding.allowed(len(tokenizer))[token]:
            return False
        guiding.push(token)
    return True


def test_with_tools_and_a_form_an_answer_is_a_call_or_of_that_form(service):
    tokenizer = service.model.tokenizer
    known = Vocabulary(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    talk = service.converse(USER, tools=[WEATHER, CLOCK], response_format=FORM)
    for text in ('{"city": "Rome", "days": 2}', '{"city": "Paris"}', write_call("clock", {})):
        guiding = Guiding(known, talk.guide)
        assert follows(guiding, tokenizer, text)
        assert guiding.ended
    for text in ("The river", '{"city": "Oslo"}', write_call("clock", {})[:-4] + "x", '{"a": 1}'):
        assert not follows(Guiding(known, talk.guide), tokenizer, text)
    told = tokenizer.decode(talk.prompt.token_ids)
    assert "If you call no function, answer with JSON of this schema" in told
    assert '"name": "weather"' in told
    read = talk.read(answer(service, talk).text)
    assert bool(read.tool_calls) is not bool(read.content)


@pytest.mark.parametrize(
    "several_of", [{"parallel_tool_calls": True}, {"response_format": {"type": "json_object"}}]
)
def test_a_form_beside_tools_takes_their_other_choices(service, several_of):
    options = {"tools": [WEATHER, CLOCK], "response_format": FORM, **several_of}
    forced = service.converse(USER, **options, tool_choice="clock")
    assert [one.name for one in forced.read(answer(service, forced).text).tool_calls] == ["clock"]
    assert "answer with JSON" not in service.model.tokenizer.decode(forced.prompt.token_ids)
    never = service.converse(USER, **options, tool_choice="none")
    assert never == service.converse(USER, response_format=options["response_format"])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "weather", "arguments": {}}',
        '{"city": "<tool_call>{\\"name\\": \\"weather\\"}</tool_call>"}',
        '"<tool_call>"',
        "",
    ],
)
@given(cuts=st.lists(st.integers(0, 60), max_size=4))
def test_an_answer_of_a_form_is_no_call_whatever_it_says(text, cuts):
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    reader = CallReader(["weather"], formed=True)
    found = [one for start, stop in pairwise(bounds) for one in reader.push(text[start:stop])]
    found += reader.finish()
    assert "".join(found) == text
    for cut in (3, len(CALLED)):
        reader = CallReader(["weather"], formed=True)
        found = [*reader.push(CALLED[:cut]), *reader.push(CALLED[cut:]), *reader.finish()]
        assert [one.name for one in found] == ["weather", "weather"]


CALLED = "\n".join([write_call("weather", {"city": "Rome"})] * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [{}]}, "a tool is"),
        ({"tools": "weather"}, "tools are a list"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "1 to 64 letters"),
        ({"tools": [WEATHER, WEATHER]}, "a name of its own"),
        ({"tools": [WEATHER], "tool_choice": "whether"}, "did you mean 'weather'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": {"function": "weather"}}, "tool_choice is"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}},
            "no answer can be",
        ),
        ({"response_format": {"type": "xml"}}, "response_format is"),
        ({"response_format": {"type": "json_schema"}}, "needs"),
        (
            {
                "tools": [WEATHER],
                "response_format": {"type": "json_schema", "json_schema": {"type": "strng"}},
            },
            "no answer can be",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(service, options, message):
    with pytest.raises(InputError, match=message):
        service.converse(USER, **options)


def test_half_a_character_is_refused(service):
    for prompt in ("a\ud800", [{"role": "user", "content": "a\ud800"}]):
        with pytest.raises(InputError, match="half a character"):
            service.prompt(prompt)


def test_a_grammar_is_compiled_once_for_all_rows(service, monkeypatch):
    compiled, checked = [], []
    real = llguidance.LLMatcher

    class Counting:
        deep_copy = real.deep_copy
        grammar_from_json_schema = staticmethod(real.grammar_from_json_schema)
        grammar_from_lark = staticmethod(real.grammar_from_lark)

        def __new__(cls, tokenizer, grammar, **options):
            compiled.append(grammar)
            return real(tokenizer, grammar, **options)

        @staticmethod
        def validate_grammar_with_warnings(grammar):
            checked.append(grammar)
            return real.validate_grammar_with_warnings(grammar)

    monkeypatch.setattr(llguidance, "LLMatcher", Counting)
    tokenizer = service.model.tokenizer
    known = Vocabulary(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    monkeypatch.setitem(running._VOCABULARIES, tokenizer, ((tokenizer.eos_token_id,), known))
    schema = closed({**SCHEMA, "title": "once"})
    params = [GenerationParams(guide=Guide.json_schema(schema)) for _ in range(3)]
    texts = [service.batch(["The", "A", "x"], params)[0].text for _ in range(2)]
    assert json.loads(texts[0]) == json.loads(texts[1])
    assert (len(compiled), len(checked)) == (1, 1)
    for number in range(KEPT + 9):
        Guiding(known, Guide.choice([f"a{number}", "b"]))
    assert known._compiled.cache_info().currsize == KEPT
    before = len(compiled)
    Guiding(known, Guide.choice([f"a{KEPT + 8}", "b"]))
    assert len(compiled) == before


def test_rows_of_one_grammar_go_their_own_ways(service):
    guide = Guide.choice(["yes", "no"])
    tokenizer = service.model.tokenizer
    known = Vocabulary(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    first, second = (Guiding(known, guide) for _ in range(2))
    before = second.allowed(len(tokenizer))
    first.push(int(before.nonzero()[0]))
    assert torch.equal(second.allowed(len(tokenizer)), before)
    assert not torch.equal(first.allowed(len(tokenizer)), before)


def test_a_guide_that_fails_on_its_way_ends_its_row_alone(service, monkeypatch):
    push = Guiding.push

    def fails(self, token):
        push(self, token)
        raise InputError("the guide cannot be followed: too large")

    monkeypatch.setattr(Guiding, "push", fails)
    params = [GenerationParams(guide=Guide.regex("z{9}")), GenerationParams(max_new_tokens=5)]
    ended = {}
    service.batch(["The", "A"], params, ended=ended.__setitem__)
    assert (ended[0].finish_reason, str(ended[0].error)[:9]) == ("error", "the guide")
    assert (ended[1].finish_reason, ended[1].completion_tokens) == ("length", 5)
    with pytest.raises(InputError, match="cannot be followed"):
        service.generate("The", params[0])


def test_a_specialist_that_takes_no_part_in_a_row_is_not_attributed(service):
    params = [
        GenerationParams(max_new_tokens=3, attribution=True, specialists=names)
        for names in (None, [], ["medical"])
    ]
    found = service.batch(["The river"] * 3, params)
    keys = [[set(one.contributions) for one in row.tokens] for row in found]
    assert keys == [[{"medical"}] * 3, [set()] * 3, [{"medical"}] * 3]


def test_a_malformed_call_in_the_history_is_refused(service):
    with pytest.raises(InputError, match="a call is"):
        service.converse([*USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}])
    with pytest.raises(InputError, match="a message is a dict"):
        service.converse(["Hi"])


def test_choices_are_read():
    tools = [Tool("weather")]
    assert read_choice(None, tools) == "auto"
    assert read_choice(None, []) == "none"
    assert read_choice(False, tools) == "none"
    assert read_choice("weather", tools) == "=weather"


def test_an_answer_that_cannot_be_a_call_is_not_held_back():
    reader = CallReader(["f"])
    assert reader.push("[1] see") == ["[1] see"]
    reader = CallReader(["f"])
    assert reader.push('{"na') == []
    assert reader.push('tion": "Rome"}') == ['{"nation": "Rome"}']


def test_a_property_may_be_called_properties():
    inner = {"type": ["object", "null"], "properties": {"properties": {"type": "string"}}}
    assert closed(inner) == {**inner, "additionalProperties": False}


def test_schemas_are_closed_where_they_list_properties():
    inner = {"type": "object", "properties": {"a": {"type": "object"}}}
    found = closed(
        {"type": "array", "items": inner, "$defs": {"x": {**inner, "additionalProperties": True}}}
    )
    assert found["items"]["additionalProperties"] is False
    assert found["$defs"]["x"]["additionalProperties"] is True
    assert "additionalProperties" not in found["items"]["properties"]["a"]


# Reading.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', ToolCall("f", {"a": 1}, '{"a": 1}')),
        ('{"name": "f", "parameters": {"a": 1}}', ToolCall("f", {"a": 1}, '{"a": 1}')),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', ToolCall("f", {"a": 1}, '{"a": 1}')),
        ('{"name": "f"}', ToolCall("f", {}, "{}")),
        ('{"name": "f", "arguments": {"a": ', ToolCall("f", None, '{"a":')),
        ('{"name": "f", "arguments": [1]}', ToolCall("f", None, "[1]")),
        ('{"title": "f"}', None),
        ("none", None),
    ],
)
def test_calls_are_read(text, expected):
    assert read_call(text) == expected


CALL = '{"name": "f", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("plain", "plain", []),
        (f"<tool_call>{CALL}</tool_call>", "", ["f"]),
        (f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see.", ["f"]),
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", ["f", "f"]),
        (f"<tool_call>{CALL}", "", ["f"]),
        ("<tool_call>nothing", "<tool_call>nothing", []),
        ("a < b, <tool", "a < b, <tool", []),
        (CALL, "", ["f"]),
        (f"[{CALL}, {CALL}]", "", ["f", "f"]),
        ('{"title": "no call"}', '{"title": "no call"}', []),
        ("[1, 2]", "[1, 2]", []),
        ('{"name": "g", "arguments": {}}', '{"name": "g", "arguments": {}}', []),
        ("[1] see the names", "[1] see the names", []),
        ("", "", []),
    ],
)
@given(cuts=st.lists(st.integers(0, 120), max_size=5))
def test_an_answer_is_split_alike_however_it_comes(text, content, names, cuts):
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    reader = CallReader(["f"])
    found = []
    for start, stop in pairwise(bounds):
        found += reader.push(text[start:stop])
    found += reader.finish()
    assert "".join(one for one in found if isinstance(one, str)) == content
    assert [one.name for one in found if isinstance(one, ToolCall)] == names
