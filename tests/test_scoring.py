"""Scorers: batches equal singles, padding and caches change nothing, ablations change what they say and no more."""

import math

import pytest
import torch

import rc_agents
from rc_agents.errors import ConfigError, InputError, ModelRunError
from rc_agents.scoring import AblatedScorer, CausalScorer, MixtureScorer, ablated
from rc_agents.training.labelled import only_at
from tests.ensembles import wake
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

pytestmark = pytest.mark.tiny
PROMPTS = ["The rain", "In the old harbour the boats", "A man", "When she came home", "It was"]
ENDS = [" of", " the sea and the", " went out"]


def coupled(span=False, **settings):
    tokenizer = tiny_tokenizer("prose")
    other = tiny_tokenizer("metaspace") if span else tokenizer
    model = rc_agents.couple(
        tiny("llama", vocab_size=len(tokenizer)),
        {"other": tiny("qwen2", vocab_size=len(other))},
        tokenizers={"anchor": tokenizer, "other": other},
        **{"topology": "unilateral", "sites": 2, **settings},
    )
    wake(model)
    return model


def alone():
    tokenizer = tiny_tokenizer("prose")
    return tiny("llama", vocab_size=len(tokenizer)), tokenizer


@pytest.fixture(scope="module", params=["frozen", "shared", "span", "mixture"])
def scorer(request):
    if request.param == "frozen":
        return CausalScorer(*alone())
    if request.param == "mixture":
        model, tokenizer = alone()
        other = tiny("qwen2", vocab_size=len(tokenizer))
        return MixtureScorer([model, other], tokenizer, lambda states, logs: logs[0] + 2 * logs[1])
    return CausalScorer(coupled(span=request.param == "span"))


def reference_logits(scorer, ids):
    """(T, V): one row, no padding, no cache, all positions."""
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    return scorer.forward(ids, mask, mask.bool())[0].float().log_softmax(-1)


def test_loglikelihood_is_the_sum_over_the_continuation(scorer):
    pairs = [(prompt, end) for prompt in PROMPTS for end in ENDS] + [("A man", ENDS[0])]
    found = scorer.loglikelihood(pairs)
    for (prompt, end), one in zip(pairs, found, strict=True):
        head = scorer.tokenizer(prompt).input_ids
        tail = scorer.tokenizer(end, add_special_tokens=False).input_ids
        with torch.no_grad():
            logs = reference_logits(scorer, head + tail)[len(head) - 1 : -1]
        expected = sum(float(row[token]) for row, token in zip(logs, tail, strict=True))
        assert one.logprob == pytest.approx(expected, abs=2e-4)
        assert one.is_greedy == all(
            int(row.argmax()) == t for row, t in zip(logs, tail, strict=True)
        )
        assert one.num_tokens == len(tail)


def test_generate_is_greedy_row_by_row(scorer):
    together = scorer.generate(PROMPTS, 6)
    assert together == [scorer.generate([prompt], 6)[0] for prompt in PROMPTS]
    ids = list(scorer.tokenizer(PROMPTS[1]).input_ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(reference_logits(scorer, ids)[-1].argmax()))
            if ids[-1] in scorer.eos:
                break
    assert together[1] == scorer.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_next_logprobs_and_nll_batched_equal_singles(scorer):
    together = scorer.next_logprobs(PROMPTS)
    singles = torch.cat([scorer.next_logprobs([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, singles, rtol=0, atol=1e-4)
    texts = PROSE.splitlines()[:5]
    for text, (loss, count) in zip(texts, scorer.nll(texts, 20), strict=True):
        alone = scorer.nll([text], 20)[0]
        assert (loss, count) == (pytest.approx(alone[0], abs=1e-3), alone[1])
        ids = scorer.tokenizer(text).input_ids[:20]
        with torch.no_grad():
            logs = reference_logits(scorer, ids)
        expected = -sum(float(row[t]) for row, t in zip(logs, ids[1:], strict=False))
        assert loss == pytest.approx(expected, abs=1e-3)
        assert count == len(ids) - 1


def test_first_line_ends_an_answer():
    model, tokenizer = alone()
    scorer = CausalScorer(model, tokenizer)
    newline = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    word = tokenizer(" the", add_special_tokens=False).input_ids[0]
    script = iter([newline, word, newline, word, word])

    def forward(ids, mask, keep, cache=None, *, use_cache=False):
        return torch.nn.functional.one_hot(torch.tensor([next(script)]), 2000).float(), None

    scorer.forward = forward
    answer = scorer.generate(["A man"], 5, first_line=True)[0]
    assert answer.strip() == "the"
    assert next(script) == word  # the answer had ended before


def test_cost_counts_models_and_real_tokens():
    model = coupled()
    scorer = CausalScorer(model, trained_parameters=7)
    scorer.next_logprobs(PROMPTS[:2])
    tokens = sum(len(model.tokenizer(prompt).input_ids) for prompt in PROMPTS[:2])
    assert (scorer.cost.passes, scorer.cost.tokens) == (2, 2 * tokens)
    assert scorer.cost.trained_parameters == 7
    assert scorer.cost.seconds > 0
    anchor = CausalScorer(model, specialists=[])
    anchor.next_logprobs(PROMPTS[:2])
    assert (anchor.cost.passes, anchor.cost.tokens) == (1, tokens)


def test_only_needed_positions_reach_the_output_layer():
    model = coupled()
    seen = []
    layer = model.get_output_embeddings()
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    CausalScorer(model).next_logprobs(PROMPTS)
    handle.remove()
    assert seen == [len(PROMPTS)]
    with only_at(model, torch.ones(1, 3, dtype=torch.bool)):
        assert model(torch.tensor([[3, 4, 5]])).logits.shape[1] == 3


def test_specialists_choose_who_speaks():
    model = coupled()
    silent = CausalScorer(model, specialists=[]).next_logprobs(PROMPTS)
    frozen = CausalScorer(model.models["anchor"], model.tokenizer).next_logprobs(PROMPTS)
    assert torch.equal(silent, frozen)
    assert not torch.allclose(CausalScorer(model).next_logprobs(PROMPTS), frozen)


def test_zero_source_is_the_frozen_anchor():
    model = coupled()
    zero = AblatedScorer(CausalScorer(model), "zero")
    frozen = CausalScorer(model, specialists=[])
    assert zero.generate(PROMPTS, 5) == frozen.generate(PROMPTS, 5)
    torch.testing.assert_close(zero.next_logprobs(PROMPTS), frozen.next_logprobs(PROMPTS))


@pytest.mark.parametrize("span", [False, True], ids=["shared", "span"])
def test_shuffled_source_is_that_of_another_row(span):
    model = coupled(span)
    ids = model.tokenizer([PROSE[:60], PROSE[60:120], PROSE[120:180]])["input_ids"]
    ids = torch.tensor([row[:10] for row in ids])
    with torch.no_grad():
        straight = model(ids).logits
        with ablated(model, "shuffled", seed=1):
            mixed = model(ids).logits
            same = model(ids[:1].expand(3, -1)).logits
            changed = model(torch.cat([ids[:1], ids[:1], ids[2:]])).logits
        again = model(ids).logits
    assert torch.equal(again, straight)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(mixed, straight, strict=True))
    torch.testing.assert_close(same[0], straight[0], rtol=1e-4, atol=1e-4)
    moved = [
        not torch.allclose(a, b, atol=1e-4) for a, b in zip(mixed[::2], changed[::2], strict=True)
    ]
    assert sum(moved) == 1  # row 1 changed, and one of the others reads it


def test_rows_that_repeat_a_prompt_do_not_read_each_other():
    model = coupled()
    ids = torch.tensor(
        [model.tokenizer(PROSE[start : start + 60]).input_ids[:8] for start in (0, 60, 120)]
    )
    for seed in range(6):
        with torch.no_grad():
            straight = model(ids.repeat_interleave(4, 0)).logits
            with ablated(model, "shuffled", seed):
                mixed = model(ids.repeat_interleave(4, 0)).logits
        assert not any(
            torch.allclose(a, b, atol=1e-3) for a, b in zip(mixed, straight, strict=True)
        )


def test_ablations_refuse_what_has_no_meaning():
    model = coupled()
    with ablated(model, "shuffled"), pytest.raises((InputError, ModelRunError), match="one row"):
        model(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ConfigError, match="shuffled"), ablated(model, "shufled"):
        pass
    lonely = rc_agents.couple(alone()[0], {}, tokenizers={"anchor": alone()[1]})
    with pytest.raises(ConfigError, match="none"), ablated(lonely, "zero"):
        pass


def test_ablation_leaves_other_ensembles_alone():
    model, other = coupled(), coupled()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = other(ids).logits
        with ablated(model, "zero"):
            assert torch.equal(other(ids).logits, expected)


def test_mixture_of_one_model_is_that_model():
    model, tokenizer = alone()
    mixture = MixtureScorer([model, model], tokenizer, lambda states, logs: (logs[0] + logs[1]) / 2)
    single = CausalScorer(model, tokenizer)
    torch.testing.assert_close(mixture.next_logprobs(PROMPTS), single.next_logprobs(PROMPTS))
    assert math.isclose(mixture.nll([PROSE], 30)[0][0], single.nll([PROSE], 30)[0][0], rel_tol=1e-5)


def test_a_mixture_needs_one_vocabulary_and_a_continuation_a_token():
    model, tokenizer = alone()
    with pytest.raises(ConfigError, match="one vocabulary"):
        MixtureScorer([model, tiny("qwen2")], tokenizer, lambda states, logs: logs[0])
    with pytest.raises(InputError, match="empty"):
        CausalScorer(model, tokenizer).loglikelihood([("A man", "")])
