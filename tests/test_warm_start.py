"""Closed-form starts against oracles, and the gate that shuts."""

import pytest
import torch

import rc_agents
from rc_agents.bridges import Bridge, TokenGate
from rc_agents.errors import TrainingError
from rc_agents.training import data as records
from rc_agents.training.closed_form import NormalEquations
from rc_agents.training.gate_start import fit_gate, start_gates
from rc_agents.training.warm_start import choose_start, gather, set_start, warm_start
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

TEXTS = PROSE.splitlines() * 4


def equations(x, y):
    sums = NormalEquations.empty(x.shape[1], y.shape[1])
    for start in range(0, len(x), 7):
        sums.add(x[start : start + 7], y[start : start + 7])
    return sums


def data(width=6, target=4, count=80):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, dtype=torch.float64, generator=generator)
    w = torch.randn(target, width, dtype=torch.float64, generator=generator)
    return x, x @ w.T, w


def test_ridge_finds_the_map_that_made_the_data_and_says_how_much_it_explains():
    x, y, w = data()
    sums = equations(x, y)
    torch.testing.assert_close(sums.ridge(1e-12), w, atol=1e-8, rtol=0)
    assert sums.explained(w) == pytest.approx(1)
    assert sums.explained(0 * w) == 0


def test_procrustes_finds_a_rotation_and_its_scale():
    x, _, _ = data(width=5)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    found = equations(x, 3 * x @ q.T).procrustes()
    torch.testing.assert_close(found, 3 * q, atol=1e-8, rtol=0)


def test_a_reduced_rank_map_is_the_best_of_its_rank_on_the_data():
    x, y, w = data()
    sums = equations(x, y)
    up, down = sums.reduced_rank(w, 2)
    assert torch.linalg.matrix_rank(up @ down) == 2
    error = (x @ (up @ down).T - y).square().sum()
    values = torch.linalg.svdvals(y)
    torch.testing.assert_close(error, values[2:].square().sum(), atol=1e-8, rtol=0)


def twins(bridge=None, **settings):
    tokenizer = tiny_tokenizer("prose")
    model = tiny("llama", vocab_size=len(tokenizer))
    other = tiny("llama", vocab_size=len(tokenizer), seed=1)
    return rc_agents.couple(
        model,
        {"b": other},
        tokenizers={"anchor": tokenizer, "b": tokenizer},
        topology="unilateral",
        sites=1,
        bridge=bridge or rc_agents.BridgeConfig(gate="fixed"),
        **settings,
    )


@pytest.mark.tiny
def test_identity_less_the_own_state_puts_the_source_in_the_targets_place():
    model = twins()
    fits = gather(model, TEXTS, progress=False)
    set_start(model, fits, carrier="identity", own=1.0, ridge=1e-9)
    weight = model.bridge(("b", "anchor"), 0).map.weight.double()
    expected = torch.eye(len(weight)) - fits.sums[next(iter(fits.sums))].ridge(1e-9)
    torch.testing.assert_close(weight, expected, atol=1e-5, rtol=0)


@pytest.mark.tiny
def test_low_rank_bridges_start_at_the_nearest_map_of_their_rank():
    full, low = twins(), twins(rc_agents.BridgeConfig(kind="low_rank", rank=4, gate="fixed"))
    warm_start(full, TEXTS, progress=False)
    warm_start(low, TEXTS, progress=False)
    bridge = low.bridge(("b", "anchor"), 0).map
    product = bridge.up.weight @ bridge.down.weight
    assert torch.linalg.matrix_rank(product) == 4
    weight = full.bridge(("b", "anchor"), 0).map.weight
    assert (product - weight).norm() < weight.norm()


@pytest.mark.tiny
def test_the_start_with_the_best_score_is_kept():
    model = twins()
    fits = gather(model, TEXTS, progress=False)
    bridge = model.bridge(("b", "anchor"), 0)
    set_start(model, fits, scale=2.0)
    wanted = bridge.map.weight.detach().clone()
    best = choose_start(model, fits, lambda: float((bridge.map.weight - wanted).detach().norm()))
    assert (best["scale"], best["own"], len(best["tried"])) == (2.0, 0.0, 8)
    assert torch.equal(bridge.map.weight, wanted)


@pytest.mark.tiny
def test_an_unknown_carrier_is_refused():
    model = twins()
    with pytest.raises(TrainingError, match=r"unknown carrier 'ridg'; .*ridge"):
        set_start(model, gather(model, TEXTS[:2], progress=False), carrier="ridg")


def shutting(init, floor=0.5):
    config = rc_agents.BridgeConfig(gate="token", gate_init=init, gate_floor=floor, start="default")
    return Bridge(config, 4, 4)


def test_a_gate_below_its_floor_is_exactly_zero_and_can_open_again():
    bridge = shutting(init=-1.0)
    source, target = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    update = bridge(source, target)
    assert torch.equal(update, torch.zeros_like(update))
    update.sum().backward()
    assert bridge.gate.value.grad.abs() > 0
    assert isinstance(bridge.gate, TokenGate)


def test_a_gate_above_its_floor_is_the_gate_without_one():
    torch.manual_seed(0)
    shut, plain = shutting(init=1.0), shutting(init=1.0, floor=0.0)
    plain.load_state_dict(shut.state_dict())
    source, target = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    assert torch.equal(shut(source, target), plain(source, target))


def test_a_fitted_gate_opens_for_its_examples_alone_and_keeps_its_word_about_silence():
    generator = torch.Generator().manual_seed(0)
    gate = shutting(init=0.0, floor=0.05).gate
    direction = torch.tensor([1.0, -1.0, 0.5, 0.0])
    draws = {
        end: torch.randn(3000, 4, generator=generator) + shift
        for end, shift in (("source", 0.0), ("target", 0.0))
    }
    speaks = draws["source"] @ direction > 0.8
    positive = {end: states[speaks] for end, states in draws.items()}
    negative = {end: states[~speaks] for end, states in draws.items()}
    fit = fit_gate(gate, positive, negative, penalty=1e-5, quiet=0.99)
    assert fit.open > 0.6
    assert fit.shut >= 0.989
    assert (fit.positives, fit.negatives) == (int(speaks.sum()), int((~speaks).sum()))
    with torch.no_grad():
        open_share = (gate(positive["source"], positive["target"]) > 0).float().mean()
        shut_share = (gate(negative["source"], negative["target"]) == 0).float().mean()
    assert float(open_share) == pytest.approx(fit.open, abs=1e-3)
    assert float(shut_share) == pytest.approx(fit.shut, abs=1e-3)


def gated(*names, sites):
    """A unilateral ensemble of tiny models with token gates that shut."""
    tokenizer = tiny_tokenizer("prose")
    form = {"vocab_size": len(tokenizer)}
    others = {name: tiny("llama", seed=seed, **form) for seed, name in enumerate(names, start=1)}
    return rc_agents.couple(
        tiny("llama", **form),
        others,
        tokenizers=dict.fromkeys(("anchor", *names), tokenizer),
        topology="unilateral",
        sites=sites,
        bridge=rc_agents.BridgeConfig(gate="token", gate_floor=0.1),
    )


@pytest.mark.tiny
def test_whole_prompts_are_read_from_where_a_groups_prompts_begin_to_differ(tmp_path):
    model = gated("b", sites=1)
    tokenizer = model.tokenizer
    groups = {"one": "What is the name of {}?", "two": "{} has the name"}
    pairs = [
        records.Pair(text.format(name), " the river", group)
        for group, text in groups.items()
        for name in ("medicine", "children")
    ]
    told = records.encode(tokenizer, pairs, max_length=64, block_length=16)
    rows = [one.ids for one in told[:2]]
    alike = next(k for k, (a, b) in enumerate(zip(*rows, strict=False)) if a != b)
    expected = sum(len(one.ids) - 1 - alike for one in told[:2])
    expected += sum(len(one.ids) - 2 for one in told[2:])
    fits = start_gates(
        model,
        {"b": pairs},
        PROSE.splitlines(),
        tmp_path,
        block_length=16,
        whole_prompts=True,
        progress=False,
    )
    assert alike > 3
    assert fits["b__anchor.0"].positives == expected


@pytest.mark.tiny
def test_gates_start_from_pairs_and_silent_text_and_leave_other_specialists_alone(tmp_path):
    model = gated("b", "c", sites=2)
    tokenizer = model.tokenizer
    pairs = [{"prompt": f"What is {n}?", "completion": f" the number {n}"} for n in range(9)]
    fits = start_gates(
        model, {"b": pairs}, PROSE.splitlines(), tmp_path, block_length=16, progress=False
    )
    assert set(fits) == {"b__anchor.0", "b__anchor.1"}
    assert all(fit.shut >= 0.99 for fit in fits.values())
    for site in (0, 1):
        assert model.bridge(("b", "anchor"), site).gate.reads["source"].any()
        assert not model.bridge(("c", "anchor"), site).gate.reads["source"].any()
    with pytest.raises(TrainingError, match="no bridge leads from 'd'"):
        start_gates(model, {"d": pairs}, PROSE.splitlines(), tmp_path)
    kept = {name: value.clone() for name, value in model.trainable_parameters()}
    others = [{"prompt": f"Who is {n}?", "completion": f" the man {n}"} for n in range(9)]
    quiet = records.encode(
        tokenizer, records.read(PROSE.splitlines()), max_length=64, block_length=16
    )
    told = records.encode(tokenizer, records.read(others), max_length=64, block_length=16)
    fits = start_gates(
        model,
        {"b": pairs, "c": others},
        PROSE.splitlines(),
        tmp_path,
        block_length=16,
        only="b",
        progress=False,
    )
    answers = sum(len(one.ids) - one.answer_start for one in told)
    assert {fit.negatives for fit in fits.values()} == {
        sum(len(one.ids) - 2 for one in quiet) + answers
    }
    for name, value in model.trainable_parameters():
        assert name.startswith("bridges.b__anchor") or torch.equal(value, kept[name])
    with pytest.raises(TrainingError, match="no pairs for only='d'"):
        start_gates(model, {"b": pairs}, PROSE.splitlines(), tmp_path, only="d")
