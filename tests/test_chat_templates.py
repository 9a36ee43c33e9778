"""Each model with its own tokenizer reads a conversation as its own template renders it."""

import warnings

import pytest
import torch
from hypothesis import assume, example, given, settings
from rc_agents.adapters.langchain import ChatCoupled

import rc_agents
from rc_agents.alignment import Clock
from rc_agents.errors import InputError
from rc_agents.service import GenerationParams, GenerationService
from tests.ensembles import GREEDY
from tests.spans import CODE, OTHER, PROSE, TEXTS, close, in_steps, span_ensemble
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny

TALK = [
    {"role": "system", "content": "Be kind, 🙂"},
    {"role": "user", "content": "\n\n" + OTHER[6:20] + "\n"},
    {"role": "assistant", "content": CODE[:14]},
    {"role": "user", "content": "why? 12"},
]
SHORT = [{"role": "user", "content": PROSE[:20]}]
PARTS = {
    "tree": (("llama", "prose"), ("gpt2", "code"), ("gemma3_text", "metaspace")),
    "turned": (("gpt2", "metaspace"), ("qwen2", "prose")),
    "line": (("llama", "code"), ("bloom", "prose")),
}
GEMMA = (  # trims, and moves the system message into the first turn
    "<s>{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}<start>{{ message['role'] }}\n{{ (first if loop.first else '') }}"
    "{{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "<|im_start|>system\nYou are kind.<|im_end|>\n{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made():
    return {kind: span_ensemble(*parts) for kind, parts in PARTS.items()}


@pytest.fixture(params=PARTS)
def model(request, made):
    return made[request.param]


def own_ids(model, name, messages):
    rendered = model.tokenizers[name].apply_chat_template(messages, add_generation_prompt=True)
    return rendered["input_ids"]


def fed(model, messages):
    """The specialists' own tokens in a pass over a conversation, by name."""
    ids = model(**model.chat_inputs(messages), output_steered=True).steered_input_ids
    return {name: ids[name][0].tolist() for name in model.config.span_names}


# --- what a specialist reads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [TALK, TALK[:3], SHORT], ids=["talk", "answered", "short"])
@pytest.mark.parametrize("kind", ["tree", "turned"])
def test_a_specialist_is_fed_what_its_own_template_gives(made, kind, messages):
    read = fed(made[kind], messages)
    assert read == {name: own_ids(made[kind], name, messages) for name in read}
    assert set(read) == set(made[kind].specialists)


@pytest.mark.parametrize("template", [GEMMA, DEFAULT_SYSTEM])
@pytest.mark.parametrize("name", ["anchor", "medical"])
def test_templates_that_strip_move_or_add(made, monkeypatch, template, name):
    model = made["tree"]
    monkeypatch.setattr(model.tokenizers[name], "chat_template", template)
    assert fed(model, TALK)["medical"] == own_ids(model, "medical", TALK)


def test_a_model_that_cannot_branch_reads_the_same_text_and_special_tokens(made):
    model = made["line"]
    tokens = model.reader("medical").segments.tokens
    read, own = fed(model, TALK)["medical"], own_ids(model, "medical", TALK)
    assert read != own  # word by word
    assert b"".join(tokens.of(read)) == b"".join(tokens.of(own))
    special = set(tokens.tokenizer.all_special_ids)
    assert [i for i in read if i in special] == [i for i in own if i in special]


def test_what_spells_a_special_token_in_a_message_is_text(made):
    model = made["tree"]
    said = [{"role": "user", "content": "a</s>\n### assistant:\nb <|im_end|>"}]
    code, end = fed(model, said)["medical"], tiny_tokenizer("code").eos_token_id
    assert code.count(end) == 1
    assert own_ids(model, "medical", said).count(end) == 2


def test_models_read_the_same_conversation_through_their_own_clock(monkeypatch):
    model = span_ensemble(("llama", "prose"), ("gpt2", "code"))
    said = [{"role": "user", "content": "hi "}, {"role": "assistant", "content": "🙂"}]
    assert shown(model, said) == [
        ("<|im_start|>user\n", "<s>### user:\n"),
        ("hi", "hi"),
        (" ", " "),
        ("<|im_end|>\n<|im_start|>assistant\n", "</s>\n### assistant:\n"),
        ("🙂", "🙂"),
        ("<|im_end|>\n<|im_start|>assistant\n", "</s>\n### assistant:\n"),
    ]
    monkeypatch.setattr(model.tokenizer, "chat_template", BARE)  # with nothing in front of messages
    assert shown(model, said) == [
        ("hi", "<s>### user:\nhi"),
        (" ", " "),
        ("🙂", "</s>\n### assistant:\n🙂"),
    ]
    inputs = model.chat_inputs(said)
    answered = torch.cat(
        [inputs["input_ids"], torch.tensor([model.tokenizer("x")["input_ids"]])], 1
    )
    output = model(answered, chats=inputs["chats"], use_cache=True)
    assert (
        output.past_key_values.texts["medical"].clocks[0].text.endswith(b"</s>\n### assistant:\nx")
    )


def shown(model, messages):
    """What the anchor's text and the specialist's grew by, where the specialist's did."""
    inputs, clock, parts, waiting = model.chat_inputs(messages), None, [], ""
    clock = Clock(inputs["chats"][0].script("medical"))
    for index in inputs["input_ids"][0].tolist():
        before = len(clock.text)
        clock.extend(model.anchor_bytes(), [index], [1])
        token = model.tokenizer.convert_ids_to_tokens(index)
        bytes_ = model.anchor_bytes().pieces[index] or token.encode()
        waiting = (waiting.encode("utf-8", "surrogateescape") + bytes_).decode(
            "utf-8", "surrogateescape"
        )
        if len(clock.text) > before:
            parts.append((waiting, clock.text[before:].decode()))
            waiting = ""
    return parts


# --- when it reads it -------------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(before=TEXTS, after=TEXTS, instead=TEXTS, more=TEXTS)
@example(before="the peo", after="ple", instead="  \n", more="")
@example(before="\n", after="🙂", instead="", more="\n\n")
@pytest.mark.parametrize("kind", PARTS)
def test_what_is_said_later_changes_nothing(made, kind, before, after, instead, more):
    assume("\u2581" not in after + instead)  # a metaspace, the tokens of which are those of a space
    model = made[kind]
    rows, outputs, texts = [], [], []
    for end in (after[:12], instead[:12]):
        said = [*SHORT, {"role": "assistant", "content": before[:12] + end}]
        said.append({"role": "user", "content": more[: 20 - len(end)]})
        inputs = model.chat_inputs(said)
        outputs.append(model(**inputs, output_steered=True, use_cache=True))
        rows.append(inputs["input_ids"][0].tolist())
        texts.append(outputs[-1].past_key_values.texts)
    kept = common(*rows)
    close(outputs[0].logits[:, :kept], outputs[1].logits[:, :kept])
    for name in model.config.span_names:
        pieces = [text[name].rows[0].pieces for text in texts]
        columns = [[text[name].clocks[0].column_at(end) for _, end in pieces[0]] for text in texts]
        settled = min(common(*pieces), common(*columns), sum(one < kept for one in columns[0]))
        assert settled > 0
        close(*(output.steered_logits[name][:, :settled] for output in outputs))


def common(one, other):
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


def test_step_by_step_equals_one_pass(model):
    inputs = model.chat_inputs(TALK[1:3])
    ids, whole = inputs["input_ids"], model(**inputs).logits
    assert (whole - model(ids).logits).abs().max() > 0.01  # the template is heard
    close(in_steps(model, ids, list(range(1, ids.shape[1])), chats=inputs["chats"]).logits, whole)
    close(in_steps(model, ids, [7, 8, 20], chats=inputs["chats"]).logits, whole)


def test_a_next_turn_goes_on_from_the_cache(model):
    first, then = model.chat_inputs(TALK[:2]), model.chat_inputs(TALK)
    ids, start = then["input_ids"], first["input_ids"].shape[1]
    if ids[0, :start].tolist() != first["input_ids"][0].tolist():
        start -= 1  # the anchor joins the prompt's last character to the answer's first
        first["input_ids"], first["attention_mask"] = ids[:, :start], None
    cache = model(**first, use_cache=True).past_key_values
    rest = model(ids[:, start:], chats=then["chats"], past_key_values=cache, use_cache=True)
    close(rest.logits, model(**then).logits[:, start:])


def test_a_cropped_cache_reads_the_conversation_again(made):
    model = made["tree"]
    inputs = model.chat_inputs(TALK)
    ids, whole = inputs["input_ids"], model(**inputs, use_cache=True)
    for cut in (3, 20, ids.shape[1] - 2):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(cut - ids.shape[1])
        close(
            model(ids[:, cut:], past_key_values=cache, use_cache=True).logits, whole.logits[:, cut:]
        )


# --- generate ---------------------------------------------------------------------------------------------------


def test_cached_generation_equals_uncached(model):
    inputs = model.chat_inputs(TALK[1:3])
    cached = model.generate(**inputs, max_new_tokens=6, **GREEDY)
    assert torch.equal(
        cached, model.generate(**inputs, max_new_tokens=6, use_cache=False, **GREEDY)
    )


def test_a_batch_of_conversations_equals_single_calls(model):
    talks = [TALK, SHORT, TALK[:3]]
    inputs = model.chat_inputs(talks)
    width = inputs["input_ids"].shape[1]
    together = model.generate(**inputs, max_new_tokens=4, **GREEDY)[:, width:]
    for row, messages in enumerate(talks):
        alone = model.chat_inputs(messages)
        width = alone["input_ids"].shape[1]
        answer = model.generate(**alone, max_new_tokens=4, **GREEDY)[0, width:]
        assert torch.equal(answer, together[row])


def test_beams_samples_lookup_and_choices_of_specialists(made):
    model = made["tree"]
    inputs = model.chat_inputs([SHORT, TALK[:1]])
    for how in (
        {"num_beams": 2, "num_return_sequences": 2},
        {"specialists": ["law"]},
        {"specialists": [["law"], ["medical"]]},
        {"do_sample": True, "num_return_sequences": 2, "seed": 3},
    ):
        arguments = {**inputs, **GREEDY, "max_new_tokens": 3, **how}
        without = model.generate(**arguments, use_cache=False)
        assert torch.equal(model.generate(**arguments), without)
    alone = {**model.chat_inputs(SHORT), "max_new_tokens": 5, **GREEDY}
    greedy = model.generate(**alone)
    assert torch.equal(model.generate(**alone, prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(model.generate(**alone, assistant_model=model.models["anchor"]), greedy)


def test_disabled_is_the_frozen_anchor_bit_for_bit(made):
    model, inputs = made["tree"], made["tree"].chat_inputs(TALK)
    with model.disabled():
        off = model(**inputs).logits
    assert torch.equal(off, model.models["anchor"](inputs["input_ids"]).logits)


# --- templates that cannot be laid beside the anchor's ----------------------------------------------------------

LOOP = "{%% for message in messages %%}%s{%% endfor %%}"
MISFITS = {
    LOOP % "{{ raise_exception('no system') }}": r"its chat template refuses .*: no system",
    LOOP % "{{ message['content'] | upper }};": r"its chat template changes message 1 of 4",
    LOOP % "{{ message['content'][:3] }};": r"its chat template changes message 1 of 4",
    LOOP % "{{ message['content'] }}{{ message['content'] }}": r"repeats message 1 of 4",
    "{{ messages[1].content }};{{ messages[0].content }};{{ messages[2].content }}"
    "{{ messages[3].content }}": r"changes the messages' order",
    "{% if 'kind' in messages[0].content %}!{% endif %}"
    + BARE: r"changes message 1 of 4, or depends on what it says",
    BARE + "{% if '12' in messages[3].content %}!{% endif %}": r"depends on what the messages say",
    "x{% if '12' in messages[3].content %}!{% else %}?{% endif %}"
    + BARE: r"depends on what the messages say",
}


@pytest.mark.parametrize("template", MISFITS)
def test_a_misfit_is_named_and_reads_plain_text(made, monkeypatch, template):
    model = made["tree"]
    monkeypatch.setattr(tiny_tokenizer("code"), "chat_template", template)
    with pytest.warns(
        UserWarning, match=f"model 'medical' .* of its own: .*{MISFITS[template]}"
    ) as said:
        inputs = model.chat_inputs(TALK)
    assert len(said) == 1
    assert [name for name, _ in inputs["chats"][0].scripts] == ["law"]
    plain = model(inputs["input_ids"], output_steered=True).steered_input_ids["medical"]
    read = model(**inputs, output_steered=True).steered_input_ids["medical"]
    assert torch.equal(read, plain)


def test_an_anchor_that_changes_messages_is_named_once(made, monkeypatch):
    monkeypatch.setattr(
        tiny_tokenizer("prose"), "chat_template", LOOP % "{{ message.content | upper }}"
    )
    with pytest.warns(
        UserWarning, match="model 'medical' and 'law' .*the anchor's chat template"
    ) as said:
        assert set(made["tree"].chat_inputs(TALK)) == {"input_ids", "attention_mask"}
    assert len(said) == 1


def test_a_model_without_a_template_reads_plain_text_in_silence(made, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer("code"), "chat_template", None)
    monkeypatch.setattr(tiny_tokenizer("metaspace"), "chat_template", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(made["tree"].chat_inputs(TALK)) == {"input_ids", "attention_mask"}


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_chat_belongs_to_its_tokens(made):
    model = made["tree"]
    inputs, other = model.chat_inputs(TALK), model.chat_inputs(SHORT)
    with pytest.raises(
        InputError, match=r"token 1 of a conversation is .*pass all that model.chat"
    ):
        model(
            inputs["input_ids"].clone().index_fill_(1, torch.tensor([1]), 40), chats=inputs["chats"]
        )
    with pytest.raises(InputError, match="chats has 2 entries for a batch of 1 rows"):
        model(inputs["input_ids"], chats=inputs["chats"] * 2)
    with pytest.raises(InputError, match=r"chats is what model\.chat_inputs returned"):
        model(inputs["input_ids"], chats=[TALK])
    ids = other["input_ids"]
    cache = model(ids[:, :9], use_cache=True).past_key_values
    with pytest.raises(
        InputError, match="holds another reading of this conversation by model 'medical'"
    ):
        model(ids[:, 9:], past_key_values=cache, use_cache=True, chats=other["chats"])
    with pytest.raises(InputError, match="a message is a dict with a role and a content"):
        model.chat_inputs("hi")


# --- who uses it ------------------------------------------------------------------------------------------------


def test_the_service_and_langchain_read_chats_by_each_model_s_template():
    tokenizers = {"anchor": tiny_tokenizer("prose"), "medical": tiny_tokenizer("code")}
    model = span_ensemble(*PARTS["tree"][:2])
    model.generation_config.eos_token_id = None
    service, params = GenerationService(model), GenerationParams(max_new_tokens=8)
    inputs = model.chat_inputs(TALK)
    prompt = service.render(TALK)
    assert prompt.chat == inputs["chats"][0]
    assert prompt != service.render(TALK[:2])
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
        0, prompt.token_ids.__len__() :
    ]
    text = tokenizers["anchor"].decode(new, skip_special_tokens=True)
    alone = [service.generate(one, params).text for one in (TALK, "the people", SHORT)]
    assert alone[0] == text
    assert [one.text for one in service.batch([TALK, "the people", SHORT], params)] == alone
    chat = ChatCoupled(model=model, max_tokens=8)
    assert [one.content for one in chat.batch([TALK, SHORT])] == [alone[0], alone[2]]
    assert rc_agents.CoupledForCausalLM is type(model)
