"""What holds for every architecture, topology and bridge."""

import math
from itertools import product

import pytest
import torch

import rc_agents
from rc_agents import BridgeConfig, Edge, Topology
from rc_agents.bridges import Bridge
from rc_agents.execution import SCHEDULES
from rc_agents.execution.exchange import Exchange
from tests.ensembles import (
    GREEDY,
    ensemble,
    frozen_logits,
    padded,
    prompts,
    unchanged_bases,
)
from tests.tiny import TINY, tiny

pytestmark = pytest.mark.tiny

# Every architecture as the anchor of a Llama, and as a specialist under a GPT-2.
ROLES = [(arch, "llama") for arch in TINY] + [("gpt2", arch) for arch in TINY if arch != "llama"]
TRIPLES = [
    ("llama", "gemma3_text", "gpt2"),
    ("mamba2", "gpt_neox", "lfm2"),
    ("bloom", "qwen3_moe", "opt"),
    ("gemma2", "bamba", "falcon"),
    ("phi3", "cohere", "granite"),
]
CHAIN = Topology([("law", "medical"), ("medical", "anchor")])
TOPOLOGIES = ["unilateral", "star_bilateral", "multi_bilateral", CHAIN]
NO_STATE_BACK = {"mamba2", "bamba"}  # generate() rolls no recurrent state back
each_role = pytest.mark.parametrize("archs", ROLES + TRIPLES, ids="+".join)


def _bridges():
    """Every kind with every gate and start that it takes, and every other setting once."""
    kinds = ("linear", "low_rank", "bottleneck", "random")
    return [
        BridgeConfig(kind=kind, gate=gate, start=start, rank=3 if kind == "low_rank" else None)
        for kind, gate, start in product(kinds, ("fixed", "scalar", "token"), ("zero", "default"))
    ] + [
        BridgeConfig(start="ridge"),
        BridgeConfig(start="identity"),
        BridgeConfig(kind="moe"),
        BridgeConfig(gate="token", gate_reads="source"),
        BridgeConfig(gate="token", gate_reads="target"),
        BridgeConfig(normalize_source=False),
        BridgeConfig(update="blend", start="default"),
        BridgeConfig(update="blend", gate="token", start="identity", normalize_source=False),
    ]


def _name(bridge):
    return (
        f"{bridge.kind}-{bridge.gate}-{bridge.gate_reads}-{bridge.start}-{bridge.normalize_source}"
        f"-{bridge.update}"
    )


# Architectures, in both roles.


@each_role
def test_an_untrained_ensemble_is_its_anchor_bit_for_bit(archs):
    model, frozen = ensemble(*archs, awake=False), tiny(archs[0])
    ids = prompts()
    assert torch.equal(model(ids).logits, frozen_logits(frozen, ids))
    for side in ("left", "right"):
        ids, mask = padded((7, 4), side)
        logits = model(ids, attention_mask=mask).logits
        assert torch.equal(logits, frozen_logits(frozen, ids, mask))


@each_role
def test_the_models_hear_each_other_and_a_disabled_ensemble_is_its_anchor(archs):
    model, ids = ensemble(*archs), prompts()
    frozen = frozen_logits(tiny(archs[0]), ids)
    assert not torch.allclose(model(ids).logits, frozen, atol=1e-2)
    with model.disabled():
        assert torch.equal(model(ids).logits, frozen)
    steered = model(ids, output_steered=True).steered_logits
    for number, (name, arch) in enumerate(zip(model.names, archs, strict=True)):
        alone = frozen_logits(tiny(arch, seed=number), ids)
        assert not torch.allclose(steered[name], alone, atol=1e-2)


@each_role
def test_a_row_is_the_same_alone_in_a_batch_and_with_a_cache(archs):
    model = ensemble(*archs)
    ids, mask = padded((7, 4), "left")
    settings = {**GREEDY, "max_new_tokens": 3}
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **settings)[:, 7:]
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings)[:, 7:], expected)
    for row in range(2):
        alone = ids[row : row + 1, mask[row].bool()]
        new = model.generate(alone, attention_mask=torch.ones_like(alone), **settings)
        assert torch.equal(new[0, alone.shape[1] :], expected[row])
    ids, mask = padded((7, 4), "right")
    together = model(ids, attention_mask=mask).logits
    for row in range(2):
        alone = model(ids[row : row + 1, mask[row].bool()]).logits
        torch.testing.assert_close(together[row, mask[row].bool()], alone[0], rtol=1e-4, atol=1e-4)


@each_role
def test_gradients_reach_the_bridges_and_no_base_changes(archs):
    model, ids = ensemble(*archs), prompts()
    with unchanged_bases(model):
        out = model.train()(ids, labels=ids, output_steered=True)
        loss = out.loss + sum(logits.logsumexp(-1).mean() for logits in out.steered_logits.values())
        loss.backward()
        model.generate(ids, max_new_tokens=2, **GREEDY)
    silent = [
        name
        for name, parameter in model.trainable_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert not silent
    assert not any(p.requires_grad or p.grad is not None for p in model.lm_anchor.parameters())
    assert not any(one.training for one in model.models.values())


def _one_row(archs):
    """A prompt, generate()'s settings, and what greedy decoding makes of it without a cache."""
    model, ids = ensemble(*archs), prompts(1, 9)
    settings = {**GREEDY, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12}
    return model, ids, settings, model.generate(ids, use_cache=False, **settings)


def _assisted(model, ids, settings, expected):
    ways = [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny("llama", seed=5)},
        {"assistant_model": ensemble("llama", "qwen2", seed=1)},
    ]
    for way in ways:
        assert torch.equal(model.generate(ids, **settings, **way), expected)


FEW = [("llama", "gemma3_text"), ("gpt2", "lfm2"), ("qwen2", "mixtral", "opt"), ("bamba", "bloom")]
each_way = pytest.mark.parametrize(
    "archs",
    [*FEW, *(pytest.param(archs, marks=pytest.mark.slow) for archs in ROLES + TRIPLES)],
    ids="+".join,
)


@each_way
def test_threads_give_the_numbers_of_lockstep(archs):
    model, (ids, mask) = ensemble(*archs), padded((7, 4), "left")
    results = {}
    for schedule in SCHEDULES:
        model.config.schedule = schedule
        logits = model(ids, attention_mask=mask).logits
        new = model.generate(ids, attention_mask=mask, max_new_tokens=3, **GREEDY)
        results[schedule] = logits, new
    for one, other in zip(*results.values(), strict=True):
        assert torch.equal(one, other)


@each_way
def test_a_static_cache_changes_nothing(archs):
    model, ids, settings, expected = _one_row(archs)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)


@each_way
def test_beam_search_is_the_same_with_and_without_a_cache(archs):
    model, ids, settings, _ = _one_row(archs)
    beams = {**settings, "num_beams": 3, "num_return_sequences": 2}
    expected = model.generate(ids, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, **beams), expected)


@each_way
def test_assisted_generation_changes_nothing(archs):
    model, ids, settings, expected = _one_row(archs)
    if NO_STATE_BACK.isdisjoint(archs):
        _assisted(model, ids, settings, expected)
    else:
        with pytest.raises(ValueError, match=r"rolls .* back, which model '\w+' \(\w+\) cannot"):
            _assisted(model, ids, settings, expected)


# Topologies and bridges, on three architectures.


def _exactness(bridge, topology):
    width = 32 if bridge.kind == "moe" or bridge.start == "identity" else None
    archs, settings = ("llama", "gemma3_text", "gpt2"), {"topology": topology, "bridge": bridge}
    model = ensemble(*archs, awake=False, width=width, **settings)
    frozen, ids = tiny(archs[0], width=width), prompts()
    logits, expected = model(ids).logits, frozen_logits(frozen, ids)
    silent = bridge.start in ("zero", "ridge") and bridge.kind not in ("random", "moe")
    assert torch.equal(logits, expected) == silent
    with model.disabled():
        assert torch.equal(model(ids).logits, expected)
        new = model.generate(ids, max_new_tokens=2, **GREEDY)
        assert torch.equal(new, frozen.generate(ids, max_new_tokens=2, **GREEDY))
    cached = model.generate(ids, max_new_tokens=2, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=2, use_cache=False, **GREEDY), cached)


@pytest.mark.parametrize("bridge", _bridges(), ids=_name)
def test_every_bridge_is_silent_when_off(bridge):
    _exactness(bridge, "multi_bilateral")


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("bridge", [b for b in _bridges() if b.kind != "moe"], ids=_name)
def test_every_bridge_is_silent_when_off_in_every_topology(bridge, topology):
    _exactness(bridge, topology)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("source", ["anchor", "medical", "law"])
def test_perturbing_a_source_moves_its_targets_alone(topology, source):
    model = ensemble("llama", "gemma3_text", "gpt2", topology=topology, sites=1)
    ids = prompts()
    before = model(ids, output_steered=True).steered_logits
    embedding = model.models[source].get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: output * 1.5)
    after = model(ids, output_steered=True).steered_logits
    handle.remove()
    moved = {name for name in model.names if not torch.equal(before[name], after[name])}
    assert moved == {source} | {edge.target for edge in model.edges if edge.source == source}


def test_all_sources_are_read_before_any_target_is_written():
    """h_i + s W_ij h_j and h_j + s W_ji h_i from the states before the exchange, both."""
    plain = BridgeConfig(gate="fixed", normalize_source=False)
    model, ids, states = ensemble("llama", "llama", sites=[4], bridge=plain), prompts(), {}
    for number, name in enumerate(model.names):
        last = (alone := tiny("llama", seed=number)).model.layers[-1]
        last.register_forward_hook(lambda _, args, output, name=name: states.update({name: output}))
        alone(ids)
    steered = model(ids, output_steered=True).steered_logits
    for source, target in model.edges:
        weight = model.bridge((source, target), 0).map.weight
        hidden = states[target] + states[source] @ weight.T
        lm = model.models[target]
        expected = lm.lm_head(lm.model.norm(hidden))
        torch.testing.assert_close(steered[target], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", ["fixed", "scalar", "token"])
@pytest.mark.parametrize("normalised", [False, True])
def test_a_blend_puts_the_source_in_the_targets_place(gate, normalised):
    """(1 - g) h_i + g W n(h_j); an open gate gives what the anchor's own head says of the other's states."""
    form = BridgeConfig(gate=gate, update="blend", start="identity", normalize_source=normalised)
    model = ensemble("llama", "llama", sites=[4], bridge=form, topology="unilateral", awake=False)
    ids, states = prompts(), {}
    for number, name in enumerate(model.names):
        last = (alone := tiny("llama", seed=number)).model.layers[-1]
        last.register_forward_hook(lambda _, args, output, name=name: states.update({name: output}))
        alone(ids)
    own, heard = states["anchor"], states[model.specialists[0]]
    size = [h.square().mean(-1, keepdim=True).sqrt() for h in (own, heard)]
    value = torch.sigmoid(torch.tensor(-2.0)) if gate != "fixed" else 1.0
    if normalised:
        heard = heard * size[0] / size[1]
    lm = model.models["anchor"]
    expected = lm.lm_head(lm.model.norm((1 - value) * own + value * heard))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_of_two_open_blends_the_one_added_last_has_the_last_word():
    form = BridgeConfig(gate="scalar", update="blend", start="identity", normalize_source=False)
    sources = {"one": tiny("llama", seed=1), "two": tiny("llama", seed=2)}
    settings = {"topology": "unilateral", "sites": 1, "alignment": "shared"}
    model = rc_agents.couple(tiny("llama"), sources, bridge=form, **settings)
    shares = {"one": 0.75, "two": 0.5}
    with torch.no_grad():
        for name, share in shares.items():
            model.bridge((name, "anchor"), 0).gate.value.fill_(math.log(share / (1 - share)))
    h = torch.randn(1, 3, model.config.hidden_size, dtype=torch.float64)
    states = {"anchor": h} | {name: torch.randn_like(h) for name in sources}
    exchange = Exchange(model.edges, model.bridge)
    found = exchange(0, states)["anchor"]
    expected = h
    for name, share in shares.items():
        expected = (1 - share) * expected + share * states[name]
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        model.bridge(("two", "anchor"), 0).gate.value.fill_(40.0)  # sigmoid is 1
    torch.testing.assert_close(exchange(0, states)["anchor"], states["two"])


def test_a_blend_leaves_its_target_where_its_source_has_said_nothing():
    form = BridgeConfig(gate="fixed", update="blend", start="identity")
    source, target = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    source[:, 0] = 0
    update = Bridge(form, 8, 8)(source, target)
    assert not update[:, 0].any()
    assert update[:, 1:].all()


def test_a_blend_that_is_shut_is_its_anchor_bit_for_bit():
    shut = BridgeConfig(gate="token", gate_init=-4.0, gate_floor=0.05, update="blend")
    model, ids = ensemble("llama", "gpt2", bridge=shut, awake=False), prompts()
    assert torch.equal(model(ids).logits, frozen_logits(tiny("llama"), ids))


@pytest.mark.parametrize("count", range(1, 6))
def test_one_to_five_models_couple(count):
    archs = ("gpt2", "llama", "qwen3", "opt", "gemma2")[:count]
    model, ids = ensemble(*archs), prompts()
    assert len(model.edges) == count * (count - 1)
    frozen = frozen_logits(tiny("gpt2"), ids)
    assert torch.equal(model(ids).logits, frozen) == (count == 1)
    with model.disabled():
        assert torch.equal(model(ids).logits, frozen)
    cached = model.generate(ids, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=4, use_cache=False, **GREEDY), cached)


def test_a_model_whose_states_reach_no_output_does_not_run():
    topology = Topology([("medical", "anchor"), ("anchor", "law")])
    model, ran = ensemble("llama", "gpt2", "qwen2", topology=topology), []
    for name, member in model.models.items():
        member.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(prompts())
    assert sorted(ran) == ["anchor", "medical"]
    assert model.bridge(Edge("anchor", "law"), 0) is model.bridges["anchor__law"][0]


@pytest.mark.parametrize("mix", ["average", "learned", "sigmoid"])
def test_a_mixed_output_weighs_the_models_logits(mix):
    model, ids = ensemble("llama", "gpt2", mix=mix), prompts()
    out = model(ids, output_steered=True)
    weights = model.mixer.weights(model.names).detach()
    assert weights.sum() == pytest.approx(1)
    expected = sum(w * part for w, part in zip(weights, out.steered_logits.values(), strict=True))
    torch.testing.assert_close(out.logits, expected)
    out.logits.logsumexp(-1).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.trainable_parameters())
    cached = model.generate(ids, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=4, use_cache=False, **GREEDY), cached)
    with model.disabled():
        assert torch.equal(model(ids).logits, frozen_logits(tiny("llama"), ids))
