"""generate(): every way of decoding over an ensemble, and what a forward returns beside logits."""

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
    pipeline,
)

import rc_agents
from rc_agents.errors import ConfigError, InputError, ModelRunError
from tests.ensembles import GREEDY, ensemble, frozen_logits, padded, prompts, wake
from tests.tiny import tiny
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny

PAIR = ("llama", "gemma3_text")
PAIRS = pytest.mark.parametrize(
    "archs", [PAIR, ("lfm2", "gpt2"), ("bloom", "mamba2")], ids="+".join
)


@pytest.fixture
def spoken():
    """A Llama and a GPT-2 that share a real tokenizer."""
    tokenizer = tiny_tokenizer("prose")
    members = [tiny(arch, vocab_size=len(tokenizer)) for arch in ("llama", "gpt2")]
    tokenizers = {"anchor": tokenizer, "medical": tokenizer}
    model = rc_agents.couple(members[0], {"medical": members[1]}, tokenizers=tokenizers, sites=2)
    wake(model)
    return model


# Sampling.


def test_a_seed_makes_samples_repeat():
    model, ids = ensemble(*PAIR), prompts(1)
    settings = {**GREEDY, "do_sample": True, "max_new_tokens": 8}
    first = model.generate(ids, seed=7, **settings)
    torch.rand(5)  # whatever else draws from the global generator
    assert torch.equal(model.generate(ids, seed=7, **settings), first)
    assert not torch.equal(model.generate(ids, seed=8, **settings), first)
    assert torch.equal(model.generate(ids, seed=7, use_cache=False, **settings), first)


def test_every_row_samples_from_its_own_seed():
    model, (ids, mask) = ensemble(*PAIR), padded((7, 5, 7), "left")
    settings = {**GREEDY, "do_sample": True, "max_new_tokens": 6, "top_k": 20, "temperature": 0.8}
    together = model.generate(ids, attention_mask=mask, seed=3, **settings)
    listed = model.generate(ids, attention_mask=mask, seed=[3, 4, 5], **settings)
    assert torch.equal(together, listed)
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        new = model.generate(alone, seed=3 + row, **settings)
        assert torch.equal(new[0, alone.shape[1] :], together[row, 7:])
    copies = model.generate(ids[:1], seed=3, num_return_sequences=2, **settings)
    assert torch.equal(copies[0], together[0])
    assert not torch.equal(copies[0], copies[1])


def test_seeded_samples_follow_the_distribution():
    model, ids = ensemble(*PAIR), prompts(1, 3)
    settings = {**GREEDY, "do_sample": True, "max_new_tokens": 1, "top_k": 4, "temperature": 3.0}
    drawn = model.generate(ids.repeat(2000, 1), seed=0, **settings)[:, -1]
    best = model(ids).logits[0, -1].topk(4)
    expected = (best.values / 3.0).softmax(-1)
    found = torch.stack([(drawn == token).float().mean() for token in best.indices])
    assert found.sum() == pytest.approx(1)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_scores_are_those_before_the_draw():
    model, ids = ensemble(*PAIR), prompts(1)
    settings = {**GREEDY, "do_sample": True, "max_new_tokens": 3, "top_k": 0}
    out = model.generate(
        ids,
        seed=1,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **settings,
    )
    for scores, logits in zip(out.scores, out.logits, strict=True):
        torch.testing.assert_close(scores, logits)


def test_sampling_without_a_seed_draws_from_torch():
    model, ids = ensemble(*PAIR), prompts(2)
    settings = {**GREEDY, "do_sample": True, "max_new_tokens": 5}
    torch.manual_seed(1)
    first = model.generate(ids, **settings)
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, **settings), first)


# Going on from a cache.


@PAIRS
def test_pieces_with_a_cache_give_the_logits_of_one_pass(archs):
    model, (ids, mask) = ensemble(*archs), padded((11, 8), "left")
    whole, cache, pieces = model(ids, attention_mask=mask).logits, None, []
    for start, end in [(0, 6), (6, 7), (7, 11)]:
        out = model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        pieces.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=1e-4, atol=1e-4)


@PAIRS
def test_generation_goes_on_from_a_returned_cache(archs):
    model, ids = ensemble(*archs), prompts(1)
    settings = {**GREEDY, "return_dict_in_generate": True}
    expected = model.generate(ids, max_new_tokens=9, **settings).sequences
    first = model.generate(ids, max_new_tokens=4, **settings)
    out = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **settings
    )
    assert torch.equal(out.sequences, expected)


def test_an_empty_cache_of_transformers_may_be_passed():
    model, ids = ensemble(*PAIR), prompts()
    expected = model.generate(ids, max_new_tokens=4, **GREEDY)
    cache = DynamicCache(config=model.lm_anchor.config)
    assert torch.equal(
        model.generate(ids, past_key_values=cache, max_new_tokens=4, **GREEDY), expected
    )
    assert torch.equal(
        model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=4, **GREEDY), expected
    )


def test_a_prompt_may_be_read_in_chunks():
    model, ids = ensemble(*PAIR), prompts(2, 13)
    expected = model.generate(ids, max_new_tokens=4, **GREEDY)
    chunked = model.generate(ids, prefill_chunk_size=5, max_new_tokens=4, **GREEDY)
    assert torch.equal(chunked, expected)


@PAIRS
@pytest.mark.parametrize("topology", ["unilateral", "multi_bilateral"])
def test_a_model_that_was_cut_out_catches_up(archs, topology):
    """Its cache then holds what it would hold, had it run beside the others unheard."""
    model = ensemble(*archs, topology=topology)
    ids, mask = padded((9, 6), "left")

    def steps(**second):
        out = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        for start, end in [(4, 5), (5, 7)]:
            out = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=out.past_key_values,
                specialists=[],
                **second,
            )
        return model(ids[:, 7:], attention_mask=mask, past_key_values=out.past_key_values).logits

    torch.testing.assert_close(steps(), steps(output_steered=True), rtol=1e-4, atol=1e-4)


def test_a_model_catches_up_inside_a_block():
    model, ids = ensemble(*PAIR), prompts(1)
    out = model(ids[:, :3], use_cache=True)
    with model.disabled("medical"):
        out = model(ids[:, 3:5], past_key_values=out.past_key_values)
    assert out.past_key_values.seen == {"anchor": 5, "medical": 3}
    out = model(ids[:, 5:], past_key_values=out.past_key_values)
    assert out.past_key_values.seen == {"anchor": 7, "medical": 7}


# Steering generate().


class Ban(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] = -torch.inf
        return scores


def test_a_logits_processor_is_heard():
    model, ids = ensemble(*PAIR), prompts(1)
    token = model.generate(ids, max_new_tokens=1, **GREEDY)[0, -1]
    banned = model.generate(
        ids, max_new_tokens=6, logits_processor=LogitsProcessorList([Ban(token)]), **GREEDY
    )
    assert token not in banned[0, 7:]
    listed = model.generate(ids, max_new_tokens=6, bad_words_ids=[[int(token)]], **GREEDY)
    assert torch.equal(listed, banned)


def test_guidance_without_a_second_prompt_runs():
    model, ids = ensemble(*PAIR), prompts(1)
    settings = {**GREEDY, "max_new_tokens": 4, "guidance_scale": 1.5}
    cached = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), cached)


def test_a_stop_string_ends_the_answer(spoken):
    inputs = spoken.tokenizer("The river", return_tensors="pt")
    whole = spoken.generate(**inputs, max_new_tokens=12, **GREEDY)[0]
    words = [spoken.tokenizer.decode(token) for token in whole[inputs["input_ids"].shape[1] : -1]]
    stop = next(word for word in words if word.isascii())
    out = spoken.generate(
        **inputs, max_new_tokens=12, stop_strings=[stop], tokenizer=spoken.tokenizer, **GREEDY
    )
    assert out.shape[1] < len(whole)
    assert torch.equal(out[0], whole[: out.shape[1]])
    assert stop in spoken.tokenizer.decode(out[0])


def test_a_streamer_hears_what_is_returned(spoken):
    inputs = spoken.tokenizer("The doctor said", return_tensors="pt")
    streamer = TextIteratorStreamer(spoken.tokenizer, skip_prompt=True)
    out = spoken.generate(**inputs, max_new_tokens=8, streamer=streamer, **GREEDY)
    new = out[0, inputs["input_ids"].shape[1] :]
    assert "".join(streamer) == spoken.tokenizer.decode(new)


def test_a_pipeline_takes_text_and_chat(spoken):
    pipe = pipeline("text-generation", model=spoken, tokenizer=spoken.tokenizer)
    inputs = spoken.tokenizer("The river", return_tensors="pt")
    expected = spoken.generate(**inputs, max_new_tokens=5, **GREEDY)
    answer = pipe("The river", max_new_tokens=5, **GREEDY)[0]["generated_text"]
    assert answer == spoken.tokenizer.decode(expected[0], skip_special_tokens=True)
    many = pipe(["The river", "The town is"], max_new_tokens=5, batch_size=2, **GREEDY)
    assert many[0][0]["generated_text"] == answer
    chat = [{"role": "user", "content": "Who came?"}]
    turns = pipe(chat, max_new_tokens=5, **GREEDY)[0]["generated_text"]
    assert turns[0] == chat[0]
    assert turns[1]["role"] == "assistant"
    ids = spoken.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = spoken.generate(**ids, max_new_tokens=5, **GREEDY)[0, ids["input_ids"].shape[1] :]
    assert turns[1]["content"] == spoken.tokenizer.decode(expected, skip_special_tokens=True)


def test_cached_equals_uncached_for_stop_strings_streamers_and_pipelines(spoken):
    inputs = spoken.tokenizer(
        ["The river", "The doctor said that"],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    whole = spoken.generate(**inputs, max_new_tokens=10, **GREEDY)
    stop = spoken.tokenizer.decode(whole[0, -4])
    pipe = pipeline("text-generation", model=spoken, tokenizer=spoken.tokenizer)
    found = []
    for use_cache in (True, False):
        settings = {**GREEDY, "max_new_tokens": 10, "use_cache": use_cache}
        ended = spoken.generate(
            **inputs, stop_strings=[stop], tokenizer=spoken.tokenizer, **settings
        )
        streamer = TextIteratorStreamer(spoken.tokenizer, skip_prompt=True)
        one = spoken.tokenizer("The river", return_tensors="pt")
        spoken.generate(**one, streamer=streamer, **settings)
        piped = pipe("The river", **settings)[0]["generated_text"]
        found.append((ended.tolist(), "".join(streamer), piped))
    assert found[0] == found[1]


@PAIRS
def test_hidden_states_of_cached_steps_are_those_without_a_cache(archs):
    model, (ids, mask) = ensemble(*archs), padded((7, 5), "left")
    settings = {
        **GREEDY,
        "attention_mask": mask,
        "max_new_tokens": 4,
        "return_dict_in_generate": True,
        "output_hidden_states": True,
    }
    cached = model.generate(ids, **settings)
    uncached = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.hidden_states, uncached.hidden_states, strict=True):
        for layer, whole in zip(one, other, strict=True):
            torch.testing.assert_close(layer[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_a_static_cache_holds_padded_rows():
    model, (ids, mask) = ensemble("llama", "gpt2"), padded((8, 5, 6), "left")
    settings = {**GREEDY, "attention_mask": mask, "max_new_tokens": 5}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)


def test_generation_settings_are_the_anchors_own():
    anchor = tiny("llama")
    anchor.generation_config.max_new_tokens = 3
    model = rc_agents.couple(anchor, {"medical": tiny("gpt2")}, alignment="shared")
    assert model.generate(prompts(1), do_sample=False, eos_token_id=None).shape == (1, 10)
    model.generation_config.max_new_tokens = 2
    assert anchor.generation_config.max_new_tokens == 3


def test_max_time_and_eos_end_generation():
    model, ids = ensemble(*PAIR), prompts(1)
    token = int(model.generate(ids, max_new_tokens=3, **GREEDY)[0, -1])
    out = model.generate(ids, max_new_tokens=9, **GREEDY | {"eos_token_id": token})
    assert out[0, -1] == token
    assert out.shape[1] < 16


# What a forward returns.


def test_hidden_states_are_the_anchors_under_coupling():
    model, ids = ensemble(*PAIR), prompts()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    lm = model.lm_anchor
    torch.testing.assert_close(lm.lm_head(out.hidden_states[-1]), out.logits)
    with model.disabled():
        alone = model(ids, output_hidden_states=True).hidden_states
    for one, other in zip(
        alone, tiny("llama")(ids, output_hidden_states=True).hidden_states, strict=True
    ):
        assert torch.equal(one, other)
    generated = model.generate(
        ids, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True, **GREEDY
    )
    assert [step[-1].shape[1] for step in generated.hidden_states] == [7, 1, 1]


def test_attentions_are_the_anchors():
    anchor = tiny("llama")
    anchor.set_attn_implementation("eager")
    model = rc_agents.couple(anchor, {"medical": tiny("gpt2")}, alignment="shared")
    out = model(prompts(), output_attentions=True)
    assert [one.shape for one in out.attentions] == [(2, 4, 7, 7)] * 4


@pytest.mark.parametrize("archs", [PAIR, ("bloom", "mamba2"), ("gpt2", "opt")], ids="+".join)
def test_the_last_logits_alone_can_be_kept(archs):
    model, ids = ensemble(*archs, mix="average"), prompts()
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    where = torch.tensor([0, 3])
    torch.testing.assert_close(model(ids, logits_to_keep=where).logits, whole[:, where])


def test_the_loss_is_that_of_any_causal_model():
    model, ids = ensemble(*PAIR), prompts()
    labels = ids.clone()
    labels[:, :3] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].reshape(-1, 96), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, expected)
    with model.disabled():
        assert torch.equal(model(ids, labels=labels).loss, tiny("llama")(ids, labels=labels).loss)


def test_steered_outputs_are_every_models_own(spoken):
    inputs = spoken.tokenizer(["The river came", "A"], return_tensors="pt", padding=True)
    out = spoken(**inputs, output_steered=True)
    assert torch.equal(out.steered_logits["anchor"], out.logits)
    assert torch.equal(out.steered_input_ids["medical"], inputs["input_ids"])
    texts = spoken.decode_steered(out)
    assert {name: len(rows) for name, rows in texts.items()} == {"anchor": 2, "medical": 2}
    with spoken.disabled():
        out = spoken(**inputs, output_steered=True)
    alone = tiny("gpt2", vocab_size=len(spoken.tokenizer))
    mask = inputs["attention_mask"]
    expected = frozen_logits(alone, inputs["input_ids"], mask)
    assert torch.equal(out.steered_logits["medical"], expected)


def test_the_output_may_be_a_tuple():
    model, ids = ensemble(*PAIR), prompts()
    loss, logits = model(ids, labels=ids, return_dict=False)
    out = model(ids, labels=ids)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)


def test_positions_may_be_passed():
    model, ids = ensemble(*PAIR, awake=False), prompts()
    places = torch.arange(20, 27).expand(2, -1)
    expected = tiny("llama")(ids, position_ids=places).logits
    assert torch.equal(model(ids, position_ids=places).logits, expected)


# Numbers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_different_precision_couple(dtype):
    members = [tiny("llama").to(dtype), tiny("gpt2").to(torch.bfloat16)]
    model = rc_agents.couple(members[0], {"medical": members[1]}, alignment="shared")
    ids, expected = prompts(), tiny("llama").to(dtype)(prompts()).logits
    assert torch.equal(model(ids).logits, expected)
    wake(model)
    out = model(ids)
    assert out.logits.dtype == dtype
    assert not torch.equal(out.logits, expected)
    assert {p.dtype for _, p in model.trainable_parameters()} == {torch.float32}


@pytest.mark.parametrize("schedule", ["lockstep", "threads"])
def test_autocast_and_inference_mode_hold_in_every_model(schedule):
    model, ids = ensemble(*PAIR, schedule=schedule), prompts()
    plain = model(ids).logits
    with torch.inference_mode():
        out = model(ids).logits
        assert out.is_inference()
        assert torch.equal(out, plain)
    with torch.no_grad():
        assert not model(ids).logits.requires_grad
    assert plain.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids).logits.dtype == torch.bfloat16


def test_scores_of_seeded_samples_are_those_before_the_draw_under_prompt_lookup():
    model, ids = ensemble(*PAIR[:1], "gpt2"), prompts(1, 4).repeat(1, 4)
    out = model.generate(
        ids,
        **{**GREEDY, "do_sample": True, "max_new_tokens": 10},
        seed=1,
        top_k=0,
        prompt_lookup_num_tokens=3,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(out.scores) == len(out.logits)
    for scores, logits in zip(out.scores, out.logits, strict=True):
        assert torch.allclose(scores, logits, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "x"}, "seed is an integer or one a row, got 'x'"),
        ({"seed": ["a", "b"]}, r"seed is an integer or one a row, got \['a', 'b'\]"),
        ({"assistant_early_exit": 2}, "assistant_early_exit is refused"),
        ({"strength": "loud"}, "strength is a finite number"),
    ],
)
def test_generate_refuses_in_one_line(settings, message):
    with pytest.raises(InputError, match=message):
        ensemble(*PAIR).generate(prompts(2), **{**GREEDY, "max_new_tokens": 2, **settings})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.full((2, 7), 96)}, r"labels holds 96, outside .* 0\.\.95"),
        ({"position_ids": [1, 2]}, r"position_ids is a tensor of shape \(2, 7\), got list"),
    ],
)
def test_forward_refuses_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message):
        ensemble(*PAIR)(prompts(2), **arguments)


def test_a_cache_of_other_rows_and_an_unknown_schedule_are_refused():
    model = ensemble(*PAIR)
    cache = model(prompts(2), use_cache=True).past_key_values
    with pytest.raises(InputError, match="holds 2 rows and input_ids has 3"):
        model(prompts(3), past_key_values=cache)
    model.config.schedule = "thread"
    with pytest.raises(ConfigError, match=r"unknown schedule 'thread'.* did you mean 'threads'"):
        model(prompts(2))


@pytest.mark.parametrize("arch", ["gpt2", "mamba2"])
def test_a_model_that_fails_while_it_catches_up_spoils_no_number(arch):
    model, ids = ensemble("llama", arch), prompts(1)
    cache = model(ids, use_cache=True, specialists=[]).past_key_values

    def fail(*_):
        raise RuntimeError("out of luck")

    hook = model.models["medical"].get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(ModelRunError, match=r"model 'medical' failed in the coupled pass: .*luck"):
        model(ids[:, :2], past_key_values=cache)
    hook.remove()
    with pytest.raises(InputError, match="half-written"):
        model(ids[:, :2], past_key_values=cache)


def test_a_crop_that_one_model_refuses_leaves_no_cache_to_go_on_with():
    model = ensemble("llama", "gemma3_text")
    cache = model(prompts(1, 12), use_cache=True).past_key_values
    with pytest.raises(InputError, match="cache of model 'medical' cannot give back 3 tokens"):
        cache.crop(-3)
    with pytest.raises(InputError, match="half-written"):
        model(prompts(1, 2), past_key_values=cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_ends_where_the_shortest_context_does(use_cache):
    short = tiny("gpt2")
    short.config.n_positions = 12
    model = rc_agents.couple(tiny("llama"), {"medical": short}, alignment="shared", sites=2)
    settings = {**GREEDY, "max_new_tokens": 20, "use_cache": use_cache}
    expected = model.generate(prompts(), specialists=[], **settings)
    with pytest.warns(UserWarning, match=r"ends here: .* 12 tokens for model 'medical'.* most 12"):
        ended = model.generate(prompts(), **settings)
    assert ended.shape == (2, 13)
    assert expected.shape == (2, 27)
    assert torch.equal(ended, expected[:, :13])  # untrained: the frozen anchor's
