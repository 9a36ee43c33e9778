"""Specialists that sleep while nobody hears them: nothing changes but what was asked for."""

import math

import pytest
import torch

import rc_agents
from rc_agents import Sparse
from rc_agents.errors import ConfigError, DataError, InputError
from rc_agents.training.sleep import choose_sparse, decoded_losses
from tests.connected import connected
from tests.ensembles import GREEDY, ensemble, padded, prompts, wake
from tests.spans import span_ensemble
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

pytestmark = pytest.mark.tiny
TRIO = ("llama", "qwen2", "gpt2")
TARGET = {"gate": "token", "gate_reads": "target", "gate_floor": 0.4}
BOTH = {"gate": "token", "gate_reads": "both", "gate_floor": 0.4}
NEW = 24


def drowsy(*archs, start=-1.5, **settings):
    """An ensemble whose gates are shut at most tokens, at `start` before they read anything."""
    model = ensemble(*archs, **settings)
    with torch.no_grad():
        for name, value in model.trainable_parameters():
            if name.endswith("gate.value"):
                value.fill_(start)
    return model


def answer(model, ids, **settings):
    return model.generate(ids, max_new_tokens=NEW, **GREEDY, **settings)


def steps(model, ids, prompt, **options):
    """Feeds a prompt, then tokens one by one; yields each output."""
    out = model(ids[:, :prompt], use_cache=True, **options)
    yield out
    for at in range(prompt, ids.shape[1]):
        out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, **options)
        yield out


def sleepers(out):
    """Who sleeps behind an output, in the single row of its cache."""
    return {name for name, rows in out.past_key_values.asleep.items() if rows.all()}


@pytest.mark.parametrize("schedule", ["lockstep", "threads"])
@pytest.mark.parametrize("topology", ["unilateral", "multi_bilateral"])
def test_where_no_gate_shuts_every_bit_is_the_dense_one(topology, schedule):
    model = ensemble(*TRIO, topology=topology, bridge={"gate": "token"}, schedule=schedule)
    ids = prompts(3, 12)
    dense = [out.logits for out in steps(model, ids, 5)]
    with model.sparse() as spared:
        sparse = [out.logits for out in steps(model, ids, 5)]
    assert all(torch.equal(one, other) for one, other in zip(sparse, dense, strict=True))
    assert spared.tokens == {"medical": 21, "law": 21}
    assert spared.share == 0
    assert spared.repeated == 0


@pytest.mark.parametrize("bridge", [BOTH, {"gate": "scalar"}, {"gate": "fixed"}])
def test_whoever_is_asked_at_every_token_gives_the_dense_bits(bridge):
    model, ids = ensemble(*TRIO, bridge=bridge), prompts(2, 12)
    dense = [out.logits for out in steps(model, ids, 5)]
    with model.sparse(Sparse(threshold=1, certainty=1)) as spared:
        sparse = [out.logits for out in steps(model, ids, 5)]
    assert all(torch.equal(one, other) for one, other in zip(sparse, dense, strict=True))
    assert spared.repeated == 7
    assert spared.share == 0


@pytest.mark.parametrize(
    ("archs", "schedule"),
    [
        (TRIO, "lockstep"),
        (TRIO, "threads"),
        (("llama", "mamba2", "gemma2"), "threads"),
        (("lfm2", "llama", "bamba"), "lockstep"),
    ],
)
def test_gates_that_read_the_target_alone_give_the_dense_answer(archs, schedule):
    """Their threshold is the floor below which they are exactly shut, and specialists that hear nobody lose nothing."""
    model = drowsy(*archs, topology="unilateral", bridge=TARGET, schedule=schedule)
    ids = prompts(3)
    expected = answer(model, ids)
    with model.sparse() as spared:
        assert torch.equal(answer(model, ids), expected)
    assert 0.1 < spared.share < 0.9
    assert spared.caught_up.total() > 0


@pytest.mark.parametrize("topology", ["unilateral", "star_bilateral", "multi_bilateral"])
@pytest.mark.parametrize("bridge", [TARGET, BOTH])
def test_a_sleepers_pass_is_a_dense_one_with_its_bridges_cut(bridge, topology):
    """Sleeping and catching up is what `specialists=[...]` at those tokens gives, the others running unheard."""
    model, ids = drowsy(*TRIO, topology=topology, bridge=bridge, start=-2.5), prompts(1, 30)
    with model.sparse(Sparse(wake=0.3, certainty=0.05)) as spared:
        cache, found, asked = None, [], []
        for at in [0, *range(6, 30)]:
            end = 6 if at == 0 else at + 1
            before = dict(spared.skipped)
            out = model(ids[:, at:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
            slept = {name for name in spared.skipped if spared.skipped[name] > before.get(name, 0)}
            asked.append([name for name in model.specialists if name not in slept])
    assert 0.1 < spared.share < 1
    assert spared.repeated
    cache = None
    for at, logits, names in zip([0, *range(6, 30)], found, asked, strict=True):
        end = 6 if at == 0 else at + 1
        out = model(
            ids[:, at:end],
            past_key_values=cache,
            use_cache=True,
            specialists=names,
            output_steered=True,
        )
        cache = out.past_key_values
        torch.testing.assert_close(logits, out.logits, rtol=1e-4, atol=1e-4)


def test_a_sleeper_does_not_run():
    model = drowsy(*TRIO, topology="unilateral", bridge=TARGET, start=-99.0)
    calls = dict.fromkeys(model.names, 0)

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    for name, one in model.models.items():
        one.register_forward_pre_hook(count(name))
    with model.sparse() as spared:
        answer(model, prompts(2))
    assert calls == {"anchor": NEW, "medical": 1, "law": 1}  # those read the prompt
    assert spared.share == 1
    assert spared.tokens["law"] == 2 * (NEW - 1)


@pytest.mark.parametrize("bridge", [TARGET, BOTH])
def test_a_row_is_the_same_alone_and_in_a_batch(bridge):
    model = drowsy(*TRIO, topology="multi_bilateral", bridge=bridge)
    lengths = (9, 6, 4)
    for side in ("left", "right"):
        ids, mask = padded(lengths, side)
        rows, shares = [], []
        with model.sparse(Sparse(wake=0.4, certainty=0.04)) as together:
            batch = stepped(model, ids, mask)
        for row, length in enumerate(lengths):
            alone = ids[row : row + 1, -length:] if side == "left" else ids[row : row + 1, :length]
            with model.sparse(Sparse(wake=0.4, certainty=0.04)) as spared:
                rows.append(stepped(model, alone, torch.ones_like(alone)))
            shares.append(spared.skipped)
        assert together.skipped == shares[0] + shares[1] + shares[2]
        torch.testing.assert_close(batch, torch.cat(rows), rtol=1e-4, atol=1e-4)


def stepped(model, ids, mask):
    """The logits of 10 more tokens behind a prompt, (B, 10, V); the tokens are the same for all rows."""
    more, out, logits = prompts(1, 10, seed=3).expand(len(ids), -1), None, []
    out = model(ids, attention_mask=mask, use_cache=True)
    for at in range(10):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(more[:, at : at + 1], attention_mask=mask, past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def test_it_repeats_and_threads_agree_with_lockstep():
    model, ids = drowsy(*TRIO, bridge=BOTH), prompts(2)
    found, counts = [], []
    for schedule in ("lockstep", "lockstep", "threads"):
        model.config.schedule = schedule
        with model.sparse(Sparse(wake=0.4, certainty=0.04)) as spared:
            found.append(answer(model, ids))
        counts.append(spared)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert counts[0] == counts[1] == counts[2]
    assert counts[0].share > 0


def test_beams_carry_who_sleeps():
    model, ids = drowsy(*TRIO, topology="unilateral", bridge=TARGET), prompts(2)
    expected = answer(model, ids, num_beams=3)
    with model.sparse() as spared:
        assert torch.equal(answer(model, ids, num_beams=3), expected)
    assert spared.share > 0.1


def test_a_static_cache_and_a_second_turn():
    model, ids = drowsy(*TRIO, topology="unilateral", bridge=TARGET), prompts(1)
    expected = answer(model, ids)
    with model.sparse() as spared:
        assert torch.equal(answer(model, ids, cache_implementation="static"), expected)
        first = answer(model, ids, return_dict_in_generate=True)
    assert spared.share > 0.1
    longer = torch.cat([first.sequences, prompts(1, 4, seed=5)], 1)
    whole = answer(model, longer)
    with model.sparse():
        again = answer(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(again, whole)


def test_outside_the_block_and_in_other_ensembles_all_is_dense():
    model = drowsy(*TRIO, topology="unilateral", bridge=TARGET, start=-99.0)
    other, ids = drowsy(*TRIO, bridge=BOTH), prompts(1, 9)
    with model.sparse() as spared:
        *_, inside = steps(model, ids, 4)
        list(steps(other, ids, 4))
    assert sleepers(inside) == {"medical", "law"}
    assert set(spared.tokens) == {"medical", "law"}
    before = spared.tokens.total()
    out = model(ids[:, :1], past_key_values=inside.past_key_values)
    assert out.past_key_values.seen == dict.fromkeys(model.names, 10)
    assert spared.tokens.total() == before


def test_whoever_is_cut_out_is_not_counted():
    model, ids = drowsy(*TRIO, topology="unilateral", bridge=TARGET), prompts(1, 12)
    with model.sparse() as spared, model.disabled("law"):
        list(steps(model, ids, 5))
    assert set(spared.tokens) == {"medical"}
    with model.sparse() as spared:
        list(steps(model, ids.expand(2, -1), 5, specialists=[["law"], []]))
    assert spared.tokens == {"law": 7}


def test_who_sleeps_is_forgotten_with_the_tokens_it_was_found_at():
    model = drowsy(*TRIO, topology="unilateral", bridge=TARGET, start=-99.0)
    with model.sparse():
        *_, out = steps(model, prompts(1, 9), 4)
    out.past_key_values.crop(-1)
    assert not out.past_key_values.asleep


def test_sleepers_of_other_processes_are_refused():
    with (
        connected(ensemble("llama", "qwen3", bridge=BOTH)) as model,
        pytest.raises(ConfigError, match="specialists sleep in one process"),
    ):
        model.sparse()


# Choosing a setting.


def spoken(seed=0):
    """A pair with a tokenizer whose gates read both ends."""
    tokenizer = tiny_tokenizer("prose")
    size = len(tokenizer)
    model = rc_agents.couple(
        tiny("llama", vocab_size=size),
        {"medical": tiny("qwen2", vocab_size=size, seed=1)},
        tokenizers=dict.fromkeys(("anchor", "medical"), tokenizer),
        topology="unilateral",
        bridge=BOTH,
        sites=2,
    )
    wake(model, seed)
    return model


TEXTS = [" ".join(PROSE.split()[at:]) for at in range(0, 80, 20)]


def test_losses_of_decoded_tokens_are_those_of_one_pass():
    model = spoken()
    ids = torch.cat(
        [model.tokenizer(text, return_tensors="pt").input_ids[:, :20] for text in TEXTS]
    )
    logits = model(ids).logits[:, 7:-1]
    expected = torch.nn.functional.cross_entropy(logits.mT, ids[:, 8:], reduction="none")
    torch.testing.assert_close(decoded_losses(model, ids, 8), expected, rtol=1e-4, atol=1e-4)


def test_the_setting_that_skips_most_within_the_cost_is_chosen():
    model = spoken()
    tried = [Sparse(certainty=1.0), Sparse(wake=0.3), Sparse(wake=1.0)]

    def choose(cost):
        found = choose_sparse(model, TEXTS, cost=cost, candidates=tried, prompt=6, length=30)
        assert [point.settings for point in found.curve] == tried
        return found

    every = choose(math.inf)
    awake, some, never = every.curve
    assert (awake.skipped, awake.cost) == (0, 0)
    assert 0 < some.skipped < never.skipped
    assert never.repeated == 0 < some.repeated
    assert every.settings == tried[2]
    cheap = max((p for p in (awake, some, never) if p.cost <= 0), key=lambda p: p.skipped)
    assert choose(0.0).settings == cheap.settings
    assert choose(-1.0).settings is None
    with pytest.raises(DataError, match="no text has 4000 tokens"):
        choose_sparse(model, TEXTS, length=4000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold is a number from 0 to 1, got -0.1"),
        ({"wake": True}, "wake is a number from 0 to 1, got True"),
        ({"certainty": 2}, "certainty is a number from 0 to 1, got 2"),
        ({"certainty": None}, "certainty is a number from 0 to 1, got None"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sparse(**settings)


def test_what_cannot_sleep_is_refused_in_one_line():
    ids = prompts(1)
    with pytest.raises(ConfigError, match="mix='anchor'"):
        ensemble(*TRIO, mix="average").sparse()
    with pytest.raises(ConfigError, match="mix='anchor'"):
        ensemble("llama", "qwen3", bridge="moe", width=32).sparse()
    with pytest.raises(ConfigError, match="its own tokenizer"):
        span_ensemble(("llama", "prose"), ("gpt2", "code")).sparse()
    model = ensemble(*TRIO, bridge=BOTH)
    with model.sparse():
        with pytest.raises(InputError, match="token by token"):
            answer(model, ids, prompt_lookup_num_tokens=2)
        with pytest.raises(InputError, match="use_cache=False"):
            answer(model, ids, use_cache=False)
