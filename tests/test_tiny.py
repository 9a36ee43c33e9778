"""The zoo stands on its own: every model runs, caches and generates, every tokenizer round-trips."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import RECIPES, TINY, saved, tiny
from tests.tiny_tokenizers import BOS, EOS, KINDS, PAD, tiny_tokenizer

TEXTS = [
    "The people of the town",
    "def add(a, b):\n    return a + b\n",
    " leading and  double spaces\t\n\n",
    "naïve 🙂 שלום 12345",
    "你好\x00\x7f",
    "a",
    "",
]

pytestmark = pytest.mark.tiny


@pytest.mark.parametrize("arch", TINY)
def test_a_tiny_model_is_frozen_small_and_the_same_again(arch):
    state = torch.random.get_rng_state()
    model, again = TINY[arch](), TINY[arch]()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert model.dtype == torch.float32
    assert not any(one.requires_grad for one in model.parameters())
    assert model.num_parameters() < 200_000
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("arch", TINY)
def test_cached_decoding_equals_one_pass(arch):
    model = TINY[arch]()
    ids_BT = torch.randint(3, 96, (2, 9))
    expected = model(ids_BT).logits
    assert expected.std() > 0.3
    name = "cache_params" if arch == "mamba2" else "past_key_values"
    cache, logits = None, []
    for start, end in [(0, 5), *((t, t + 1) for t in range(5, 9))]:
        # Bamba counts positions from zero again unless it is told.
        position_ids = {"position_ids": torch.arange(start, end)[None]} if arch == "bamba" else {}
        out = model(ids_BT[:, start:end], use_cache=True, **{name: cache}, **position_ids)
        cache = out[name]
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", TINY)
def test_generate_follows_the_logits(arch):
    model = TINY[arch]()
    prompt = torch.randint(3, 96, (1, 6))
    ids = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(model(ids[:, :-1]).logits[:, 5:].argmax(-1), ids[:, 6:])


@pytest.mark.parametrize("arch", TINY)
def test_sizes_can_be_chosen(arch):
    model = tiny(arch, vocab_size=300, seed=1, layers=2, width=48)
    out = model(torch.tensor([[3, 299]]), output_hidden_states=True)
    assert out.logits.shape == (1, 2, 300)
    assert len(out.hidden_states) == 3
    assert out.hidden_states[0].shape == (1, 2, 48)


def test_the_zoo_differs_in_depth_and_width():
    assert len({recipe.layers for recipe in RECIPES.values()}) >= 4
    assert len({recipe.width for recipe in RECIPES.values()}) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_lossless(kind):
    tokenizer = tiny_tokenizer(kind)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        PAD,
        BOS,
        EOS,
    )
    assert 300 <= len(tokenizer) <= 500
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_vocabularies_differ():
    lengths = {
        kind: [len(tiny_tokenizer(kind)(text)["input_ids"]) for text in TEXTS] for kind in KINDS
    }
    assert len({tuple(row) for row in lengths.values()}) == len(KINDS)
    assert len({len(tiny_tokenizer(kind)) for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_tokenizer_has_its_own_chat_template(kind):
    messages = [{"role": "user", "content": "Hi"}]
    text = tiny_tokenizer(kind).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert "Hi" in text
    assert text != tiny_tokenizer(kind).apply_chat_template(messages * 2, tokenize=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_with_its_tokenizer(kind, tmp_path):
    path = saved(tmp_path, "llama", kind)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.vocab_size == len(tokenizer)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == tiny_tokenizer(kind)(text)["input_ids"]
