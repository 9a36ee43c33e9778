"""Models with different tokenizers in one ensemble: passes, caches, batches, generation."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

import rc_agents
from rc_agents.errors import InputError, TokenError
from rc_agents.execution.tree import Sight, takes_branches
from tests.ensembles import GREEDY
from tests.spans import CODE, OTHER, PROSE, batch_of, close, ids_of, in_steps, span_ensemble
from tests.tiny import RECIPES, tiny
from tests.tiny_tokenizers import EOS, tiny_tokenizer

pytestmark = pytest.mark.tiny

TREES = set(RECIPES) - {"bloom", "lfm2", "mamba2", "bamba"}
PAIRS = [
    (("llama", "prose"), ("gpt2", "code")),
    (("llama", "prose"), ("gemma3_text", "metaspace")),
    (("llama", "code"), ("qwen2", "metaspace")),
    (("llama", "metaspace"), ("opt", "prose")),
    (("llama", "prose"), ("lfm2", "code")),
    (("llama", "prose"), ("mamba2", "metaspace")),
    (("llama", "code"), ("bloom", "prose")),
    (("mamba2", "prose"), ("gemma2", "code")),
    (("gemma3_text", "code"), ("bamba", "prose")),
]
TRIPLES = [
    (("llama", "prose"), ("gpt2", "code"), ("gemma3_text", "metaspace")),
    (("gpt2", "metaspace"), ("qwen2", "prose"), ("mamba2", "code")),
    (
        ("llama", "prose"),
        ("qwen3", "prose"),
        ("gemma2", "code"),
    ),  # one shares the anchor's tokenizer
]
OFTEN = [PAIRS[0], PAIRS[1], PAIRS[5], PAIRS[6], TRIPLES[1], TRIPLES[2]]
ENSEMBLES = [
    *OFTEN,
    *(
        pytest.param(parts, marks=pytest.mark.slow)
        for parts in PAIRS + TRIPLES
        if parts not in OFTEN
    ),
]
TEXT = CODE[:34] + PROSE[:12] + OTHER[:8]


def names_of(parts):
    return "-".join(arch for arch, _ in parts)


# --- which models can branch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", RECIPES)
def test_attention_models_take_branches_and_others_do_not(arch):
    assert takes_branches(tiny(arch)) == (arch in TREES)


@pytest.mark.parametrize("arch", sorted(TREES))
def test_a_branch_token_sees_its_own_past_alone(arch):
    model = tiny(arch)
    main, tail, root = torch.arange(3, 17), torch.tensor([30, 31]), 11
    ids = torch.cat([main, tail])[None]
    positions = torch.cat([torch.arange(14), torch.tensor([root, root + 1])])[None]
    allowed = torch.ones(16, 16, dtype=torch.bool).tril()
    allowed[14:, root:14] = False
    sight = Sight(allowed[None], positions, positions)
    logits = model(
        ids,
        attention_mask=sight.mask(model),
        position_ids=positions,
        past_key_values=DynamicCache(),
    ).logits
    close(logits[:, :14], model(main[None]).logits)
    close(logits[:, 14:], model(torch.cat([main[:root], tail])[None]).logits[:, root:])


# --- one pass and several give the same -------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["unilateral", "star_bilateral"])
def test_step_by_step_equals_one_pass_in_every_topology(topology):
    step_by_step_equals_one_pass(span_ensemble(*TRIPLES[0], topology=topology))


@pytest.mark.parametrize("parts", ENSEMBLES, ids=names_of)
def test_step_by_step_equals_one_pass(parts):
    step_by_step_equals_one_pass(span_ensemble(*parts))


def step_by_step_equals_one_pass(model):
    ids = ids_of(model, TEXT)
    whole = model(ids).logits
    with model.disabled():
        assert (whole - model(ids).logits).abs().max() > 0.01
    close(in_steps(model, ids, list(range(1, ids.shape[1]))).logits, whole)
    close(in_steps(model, ids, [7, 8, 20]).logits, whole)


@pytest.mark.parametrize("parts", ENSEMBLES, ids=names_of)
def test_cached_generation_equals_uncached(parts):
    model = span_ensemble(*parts)
    ids = ids_of(model, PROSE[:40])
    cached = model.generate(ids, max_new_tokens=7, **GREEDY)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=7, use_cache=False, **GREEDY))


@pytest.mark.parametrize("parts", ENSEMBLES, ids=names_of)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths_equal_single_calls(parts, side):
    model = span_ensemble(*parts)
    texts = [PROSE[:30], CODE[:44], OTHER[:9]]
    ids, mask = batch_of(model, *texts, side=side)
    logits = model(ids, attention_mask=mask).logits
    for row, text in enumerate(texts):
        close(logits[row][mask[row].bool()], model(ids_of(model, text)).logits[0])


@pytest.mark.parametrize("parts", ENSEMBLES, ids=names_of)
def test_batched_generation_equals_single_calls(parts):
    model = span_ensemble(*parts)
    texts = [PROSE[:30], CODE[:44], OTHER[:9]]
    ids, mask = batch_of(model, *texts)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=5, **GREEDY)[
        :, ids.shape[1] :
    ]
    for row, text in enumerate(texts):
        alone = ids_of(model, text)
        assert torch.equal(
            model.generate(alone, max_new_tokens=5, **GREEDY)[0, alone.shape[1] :], together[row]
        )


@pytest.mark.parametrize("parts", [PAIRS[1], TRIPLES[1]], ids=names_of)
def test_threads_equal_lockstep(parts):
    lockstep, threads = (span_ensemble(*parts, schedule=kind) for kind in ("lockstep", "threads"))
    ids, mask = batch_of(lockstep, PROSE[:30], CODE[:44])
    assert torch.equal(
        lockstep(ids, attention_mask=mask).logits, threads(ids, attention_mask=mask).logits
    )
    arguments = {"attention_mask": mask, "max_new_tokens": 6, **GREEDY}
    assert torch.equal(lockstep.generate(ids, **arguments), threads.generate(ids, **arguments))


# --- generate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [PAIRS[0], PAIRS[1], PAIRS[5], TRIPLES[0]], ids=names_of)
def test_beam_search_is_the_same_without_a_cache(parts):
    model = span_ensemble(*parts)
    ids = ids_of(model, PROSE[:24])
    arguments = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, **GREEDY}
    assert torch.equal(
        model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments)
    )


@pytest.mark.parametrize("parts", [PAIRS[0], PAIRS[1], PAIRS[6], TRIPLES[0]], ids=names_of)
def test_prompt_lookup_and_an_assistant_give_the_greedy_answer(parts):
    model = span_ensemble(*parts)
    ids = ids_of(model, "the people of the people of the people of the")
    greedy = model.generate(ids, max_new_tokens=7, **GREEDY)
    looked_up = model.generate(ids, max_new_tokens=7, prompt_lookup_num_tokens=4, **GREEDY)
    assert torch.equal(looked_up, greedy)
    assistant = model.models["anchor"]
    assert torch.equal(
        model.generate(ids, max_new_tokens=7, assistant_model=assistant, **GREEDY), greedy
    )


def test_a_static_cache_gives_the_greedy_answer():
    model = span_ensemble(*TRIPLES[0])
    ids = ids_of(model, PROSE[:40])
    greedy = model.generate(ids, max_new_tokens=6, **GREEDY)
    static = model.generate(ids, max_new_tokens=6, cache_implementation="static", **GREEDY)
    assert torch.equal(static, greedy)


def test_calls_from_four_threads_do_not_disturb_each_other():
    model = span_ensemble(*TRIPLES[1])
    texts = [PROSE[:30], CODE[:44], OTHER[:9], PROSE[20:50]]
    prompts = [ids_of(model, text) for text in texts]
    alone = [model.generate(ids, max_new_tokens=6, **GREEDY) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(model.generate, ids, max_new_tokens=6, **GREEDY) for ids in prompts]
        assert all(torch.equal(call.result(), one) for call, one in zip(calls, alone, strict=True))


@pytest.mark.parametrize("parts", [PAIRS[0], PAIRS[5], TRIPLES[1]], ids=names_of)
def test_generation_goes_on_from_a_cache(parts):
    model = span_ensemble(*parts)
    ids = ids_of(model, CODE[:30])
    whole = model.generate(ids, max_new_tokens=9, **GREEDY)
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **GREEDY
    )
    assert torch.equal(rest, whole)


@pytest.mark.parametrize("parts", ENSEMBLES, ids=names_of)
def test_a_cropped_cache_goes_on_with_another_text(parts):
    model = span_ensemble(*parts)
    one, other = ids_of(model, TEXT), ids_of(model, PROSE)[:, 10:25]
    joined = torch.cat([one[:, :12], other], 1)
    cache = model(one, use_cache=True).past_key_values
    try:
        cache.crop(12 - one.shape[1])
    except RuntimeError:
        assert model.models["anchor"].config.model_type in ("mamba2", "gemma3_text")
        pytest.skip("the anchor's own cache cannot be cut")
    close(model(other, past_key_values=cache, use_cache=True).logits, model(joined).logits[:, 12:])


def test_a_specialist_left_out_of_one_pass_reads_on_in_the_next():
    model = span_ensemble(*TRIPLES[0])
    ids = ids_of(model, TEXT)
    cache = model(ids[:, :9], use_cache=True, specialists=["law"]).past_key_values
    cache = model(
        ids[:, 9:15], past_key_values=cache, use_cache=True, specialists=["medical"]
    ).past_key_values
    logits = model(ids[:, 15:], past_key_values=cache, use_cache=True).logits
    assert logits.isfinite().all()
    assert [row.columns for row in cache.texts["medical"].rows] == [ids.shape[1]]


# --- who speaks -------------------------------------------------------------------------------------------------


def test_specialists_and_strength_hold_row_by_row():
    model = span_ensemble(*TRIPLES[0])
    texts = [PROSE[:30], CODE[:44], OTHER[:9], PROSE[:30]]
    ids, mask = batch_of(model, *texts)
    chosen, strength = [["medical"], ["law"], None, []], [0.5, 1.0, 2.0, 1.0]
    together = model(ids, attention_mask=mask, specialists=chosen, strength=strength).logits
    for row, text in enumerate(texts):
        alone = model(ids_of(model, text), specialists=chosen[row], strength=strength[row]).logits
        close(together[row][mask[row].bool()], alone[0])


@pytest.mark.parametrize("topology", ["unilateral", "star_bilateral", "multi_bilateral"])
def test_disabled_is_the_frozen_anchor_bit_for_bit(topology):
    model = span_ensemble(*TRIPLES[0], topology=topology)
    ids, mask = batch_of(model, PROSE[:30], CODE[:44])
    with model.disabled():
        off = model(ids, attention_mask=mask).logits
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    frozen = model.models["anchor"](ids, attention_mask=mask, position_ids=places).logits
    assert torch.equal(off, frozen)
    for _, parameter in model.trainable_parameters():
        parameter.data.zero_()
    assert torch.equal(model(ids, attention_mask=mask).logits, frozen)


# --- texts at the edge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [PAIRS[0], PAIRS[5], TRIPLES[0]], ids=names_of)
@pytest.mark.parametrize("text", ["a", " ", "\n", "🙂"])
def test_a_text_of_one_character(parts, text):
    model = span_ensemble(*parts)
    ids = ids_of(model, text)
    close(in_steps(model, ids, list(range(1, ids.shape[1]))).logits, model(ids).logits)
    assert model.generate(ids, max_new_tokens=3, **GREEDY).shape[1] == ids.shape[1] + 3


@pytest.mark.parametrize("kind", ["prose", "code", "metaspace"])
def test_special_tokens_alone_are_no_text(kind):
    model = span_ensemble(("llama", kind), ("gpt2", "prose"), alignment="span")
    ids = torch.full((1, 3), EOS)
    assert torch.equal(model(ids).logits, model.models["anchor"](ids).logits)
    text = torch.cat([ids, ids_of(model, "the people"), ids], 1)
    close(in_steps(model, text, [2, 4, 6]).logits, model(text).logits)


def test_half_a_character_waits():
    model = span_ensemble(("llama", "prose"), ("gpt2", "code"), topology="unilateral")
    ids = ids_of(model, "a🙂")
    assert ids.shape[1] == 5
    picks = [
        cache.texts["medical"].rows[0].pieces
        for end in range(1, 6)
        for cache in [model(ids[:, :end], use_cache=True).past_key_values]
    ]
    assert [[end for _, end in pieces] for pieces in picks] == [[0, 1]] * 4 + [[0, 1, 2, 3, 4, 5]]


def test_every_model_s_own_logits_and_next_token():
    model = span_ensemble(*TRIPLES[0])
    texts = [PROSE[:30], CODE[:44]]
    ids, mask = batch_of(model, *texts)
    output = model(ids, attention_mask=mask, output_steered=True, logits_to_keep=1)
    for name in ("medical", "law"):
        tokenizer = model.tokenizers[name]
        for row, text in enumerate(texts):
            real = output.steered_attention_mask[name][row].bool()
            assert (
                output.steered_input_ids[name][row][real].tolist() == tokenizer(text)["input_ids"]
            )
        assert output.steered_logits[name].shape[:2] == output.steered_input_ids[name].shape
    together = model.decode_steered(output)
    for row, text in enumerate(texts):
        alone = model.decode_steered(model(ids_of(model, text), output_steered=True))
        assert {name: rows[row] for name, rows in together.items()} == {
            name: rows[0] for name, rows in alone.items()
        }


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_text_too_long_in_a_specialist_s_own_tokens_is_refused():
    model = span_ensemble(("llama", "prose"), ("gpt2", "code"))
    text = "the people of the town " * 20
    ids = ids_of(model, text)
    assert ids.shape[1] < 256 < len(model.tokenizers["medical"](text)["input_ids"])
    with pytest.raises(InputError, match=r"model 'medical', which takes at most 256"):
        model(ids)
    with model.disabled("medical"):
        model(ids)


@pytest.mark.parametrize("mix", ["average", "learned"])
def test_logits_of_different_vocabularies_are_never_averaged(mix):
    with pytest.raises(TokenError, match=r"medical has its own"):
        span_ensemble(("llama", "prose"), ("gpt2", "code"), mix=mix)


# --- the other alignments ---------------------------------------------------------------------------------------


def test_auto_is_shared_for_equal_tokenizers_and_span_else():
    model = span_ensemble(*TRIPLES[2])
    assert model.config.alignment == {"medical": "shared", "law": "span"}


def test_span_over_equal_tokenizers_equals_shared():
    parts = (("llama", "prose"), ("gpt2", "prose"))
    span, shared = (span_ensemble(*parts, alignment=how) for how in ("span", "shared"))
    ids = ids_of(shared, PROSE)
    close(span(ids).logits, shared(ids).logits)


def test_clamp_gives_the_other_model_the_anchor_s_ids_cut_to_its_vocabulary():
    parts = (("llama", "prose"), ("gpt2", "code"))
    model = span_ensemble(*parts, alignment="clamp")
    ids = ids_of(model, PROSE)
    last = len(model.tokenizers["medical"]) - 1
    ids[0, 3] = last + 5
    output = model(ids, output_steered=True, strength=0.0)
    close(output.steered_logits["medical"], model.models["medical"](ids.clamp(max=last)).logits)
    close(in_steps(model, ids, [1, 5]).logits, model(ids).logits)


def test_shared_is_refused_for_different_tokenizers():
    with pytest.raises(TokenError, match="use alignment='span'"):
        span_ensemble(("llama", "prose"), ("gpt2", "code"), alignment="shared")


def test_span_needs_tokenizers():
    with pytest.raises(TokenError, match=r"needs the tokenizer of 'medical'"):
        rc_agents.couple(
            tiny("llama", vocab_size=400),
            {"medical": tiny("gpt2")},
            tokenizers={"anchor": tiny_tokenizer("prose")},
            alignment="span",
        )


def test_a_model_without_a_new_token_has_empty_steered_logits():
    model = span_ensemble(*TRIPLES[0])
    cache, ids, texts = None, ids_of(model, "hello 🙂 the"), []
    for column in range(ids.shape[1]):
        output = model(
            ids[:, column : column + 1], past_key_values=cache, use_cache=True, output_steered=True
        )
        cache = output.past_key_values
        assert set(output.steered_logits) == set(model.names)
        texts.append(model.decode_steered(output))
    assert any("" in found["medical"] for found in texts)


def test_generation_ends_where_a_model_with_its_own_tokens_has_no_room():
    model = span_ensemble(*TRIPLES[0])
    model.models["medical"].config.max_position_embeddings = 40
    ids = ids_of(model, PROSE[:20])
    with pytest.warns(UserWarning, match=r"generation ends here: .* for model 'medical'"):
        ended = model.generate(ids, max_new_tokens=60, **GREEDY)
    assert ids.shape[1] < ended.shape[1] < ids.shape[1] + 60
