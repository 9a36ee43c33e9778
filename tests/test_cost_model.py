"""The cost model says what is counted on the links, and what can be worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from rc_agents.benchmarks import cost_model
from rc_agents.benchmarks.cost_model import Plan, Port, pass_seconds, spread

from rc_agents.nodes import NodeSettings
from tests.connected import connected
from tests.ensembles import ensemble, prompts

STAR = [("medical", "anchor"), ("anchor", "medical")]


def _plan(one, tokens, wire, mask_columns=0):
    return Plan(
        compute={name: [0.0] * (len(one.sites) + 1) for name in one.names},
        edges=[tuple(edge) for edge in one.edges],
        widths={name: model.config.hidden_size for name, model in one.models.items()},
        tokens=tokens,
        wire=wire,
        mask_columns=mask_columns,
    )


def _counts(model):
    return {
        name: (channel.sent, channel.received) for name, channel in model.elsewhere.channels.items()
    }


def _check(model, plan, before):
    """Compares what has crossed the anchor's links since then with the model's figures."""
    expected = cost_model.traffic(plan)
    for name, (sent, received) in _counts(model).items():
        assert sent - before[name][0] == pytest.approx(expected["anchor", name], rel=0.03)
        assert received - before[name][1] == pytest.approx(expected[name, "anchor"], rel=0.03)


@pytest.mark.tiny
@pytest.mark.parametrize("wire", ["exact", "bfloat16", "int8"])
@pytest.mark.parametrize("topology", ["unilateral", "star_bilateral", "multi_bilateral"])
def test_bytes_are_those_that_are_counted(topology, wire):
    one = ensemble("llama", "gpt2", "qwen2", topology=topology)
    ids = prompts(1, 40)
    with connected(one, NodeSettings(deadline=20.0, wire=wire)) as model, torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        for start, end in ((8, 9), (9, 40)):
            before = _counts(model)
            model(ids[:, start:end], past_key_values=cache, use_cache=True)
            _check(model, _plan(one, end - start, wire), before)


@pytest.mark.tiny
def test_a_padded_rows_mask_is_counted():
    one, ids = ensemble("llama", "gpt2"), prompts(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    with connected(one) as model, torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
        before = _counts(model)
        model(ids, attention_mask=mask, use_cache=False)
        _check(model, _plan(one, ids.numel(), "exact", mask.numel()), before)


def _pair(num_sites, topology, anchor=1.0, specialist=1.0, deaf=True):
    depths = [(site + 1) / num_sites for site in range(num_sites)]
    return Plan(
        compute={"anchor": spread(anchor, depths), "medical": spread(specialist, depths)},
        edges=STAR[: 1 if topology == "unilateral" else 2],
        widths={"anchor": 8, "medical": 8},
        deaf=deaf,
    )


@pytest.mark.unit
@pytest.mark.parametrize("num_sites", [1, 2, 3, 4, 5, 8])
def test_latency_of_equals(num_sites):
    latency = 0.1
    alone = pass_seconds(_pair(num_sites, "unilateral"), latency=latency)
    assert alone == pytest.approx(1.0 + 2 * latency)
    both = pass_seconds(_pair(num_sites, "star"), latency=latency)
    assert both == pytest.approx(1.0 + 2 * math.ceil(num_sites / 2) * latency)


@pytest.mark.unit
def test_a_smaller_specialists_latency_is_hidden():
    ahead = _pair(4, "unilateral", anchor=1.0, specialist=0.1)
    assert pass_seconds(ahead, latency=0.05) == pytest.approx(1.0)  # 2 L + 0.025 < 0.25
    assert pass_seconds(ahead, latency=0.2) == pytest.approx(1.0 + 0.4 + 0.025 - 0.25)


@pytest.mark.unit
def test_everybody_with_everybody_pays_one_latency_a_site():
    names = ("anchor", "a", "b")
    edges = [(one, other) for one in names for other in names if one != other]
    depths = [0.25, 0.5, 0.75, 1.0]
    plan = Plan(
        compute={name: spread(1.0, depths) for name in names},
        edges=edges,
        widths=dict.fromkeys(names, 8),
    )
    assert pass_seconds(plan, latency=0.1) == pytest.approx(1.0 + 5 * 0.1)
    assert cost_model.messages(plan) == 3 * 6 + 2 + 2


@pytest.mark.unit
def test_a_prompt_is_bound_by_bandwidth():
    plan = Plan(
        compute={"anchor": [0.0] * 6, "medical": [0.0] * 6},
        edges=STAR[:1],
        widths={"anchor": 1000, "medical": 1000},
        tokens=100,
    )
    size = sum(v for (source, _), v in cost_model.traffic(plan).items() if source == "medical")
    seconds = pass_seconds(plan, {"medical": Port(up=1e6)})
    assert seconds == pytest.approx(8 * size / cost_model.PAYLOAD / 1e6, rel=1e-6)
    assert size == pytest.approx(5 * 100 * 1000 * 4, rel=0.01)


@pytest.mark.unit
def test_the_anchors_port_is_shared_by_all_specialists():
    def seconds(count):
        names = ["anchor", *(f"s{k}" for k in range(count))]
        plan = Plan(
            compute={name: [0.0, 0.0] for name in names},
            edges=[(name, "anchor") for name in names[1:]],
            widths=dict.fromkeys(names, 4096),
            tokens=1000,
        )
        return pass_seconds(plan, {"anchor": Port(down=1e9)})

    assert seconds(10) == pytest.approx(10 * seconds(1), rel=0.01)


@pytest.mark.unit
def test_frames_are_handled_one_after_another():
    one = replace(_pair(1, "unilateral", anchor=0.0, specialist=0.0), handling=0.1)
    assert pass_seconds(one) == pytest.approx(0.4)  # order out, order in, state out, state in
    names = ["anchor", *(f"s{k}" for k in range(50))]
    many = Plan(
        compute={name: [0.0, 0.0] for name in names},
        edges=[(name, "anchor") for name in names[1:]],
        widths=dict.fromkeys(names, 8),
        handling=0.1,
    )
    assert pass_seconds(many) == pytest.approx(10.0, abs=0.3)
