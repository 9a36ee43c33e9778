"""Where models, bridges and states lie; what crosses between devices."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

import rc_agents
from rc_agents import Topology, backbone
from tests.ensembles import GREEDY, prompts, wake
from tests.tiny import saved, tiny
from tests.tiny_tokenizers import tiny_tokenizer
from tests.virtual_device import CPU, Transfer, virtual_devices

pytestmark = pytest.mark.tiny

B, T = 2, 7
WIDTHS = {"anchor": 32, "medical": 48, "law": 40}
ARCHS = {"anchor": "llama", "medical": "gpt2", "law": "qwen2"}
CHAIN = Topology([("medical", "anchor"), ("law", "medical")])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: saved(folder, arch, "prose") for name, arch in ARCHS.items()}


def _couple(bases, **settings):
    specialists = {name: path for name, path in bases.items() if name != "anchor"}
    same = dict.fromkeys(bases, tiny_tokenizer("prose"))
    settings = {"sites": 2, "tokenizers": same, **settings}
    model = rc_agents.couple(bases["anchor"], specialists, **settings)
    wake(model)
    return model


def test_trainers_and_pipelines_are_told_when_models_lie_apart(bases):
    with virtual_devices(2) as devices:
        together, apart = _couple(bases), _couple(bases, device_map={"medical": devices[0]})
        assert not hasattr(together, "hf_device_map")
        places = apart.hf_device_map
    assert list(places) == ["anchor", "medical", "law"]
    assert places["anchor"] == CPU != places["medical"]


# Settings reach the loaders.


@pytest.fixture
def asked(monkeypatch):
    """What each base's loader was called with, by folder name."""
    calls, load = {}, AutoModelForCausalLM.from_pretrained

    def record(path, **settings):
        calls[str(path).rsplit("/", 1)[-1].split("-")[0]] = settings
        return load(path, **{**settings, "device_map": None})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    return calls


def test_device_map_and_dtype_reach_each_models_loader(bases, asked):
    layers = {"model.embed_tokens": 0, "model.layers": 1, "model.norm": 1, "lm_head": "cpu"}
    _couple(
        bases,
        device_map={"anchor": layers, "medical": "auto"},
        dtype={"medical": "bfloat16", "law": torch.float64},
    )
    assert asked["llama"]["device_map"] == layers
    assert asked["gpt2"]["device_map"] == "cpu"  # no accelerator is here
    assert "device_map" not in asked["qwen2"]
    assert asked["gpt2"]["dtype"] == "bfloat16"
    assert asked["qwen2"]["dtype"] == torch.float64
    assert asked["llama"]["dtype"] == "auto"
    assert all(one["use_safetensors"] and not one["trust_remote_code"] for one in asked.values())


def test_one_value_goes_to_all_and_a_reference_has_its_own_dtype(bases, asked):
    own = rc_agents.ModelRef(base=str(bases["law"]), dtype="float64")
    model = _couple({**bases, "law": own}, device_map="cpu", dtype=torch.bfloat16)
    assert {one["device_map"] for one in asked.values()} == {"cpu"}
    assert [one.dtype for one in model.models.values()] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float64,
    ]


def test_an_added_specialist_has_its_own_place(bases, asked):
    model = _couple({"anchor": bases["anchor"]})
    model.add_specialist("law", bases["law"], device_map="cpu", dtype="bfloat16")
    assert asked["qwen2"]["device_map"] == "cpu"
    assert asked["qwen2"]["dtype"] == "bfloat16"


def test_a_saved_ensemble_is_placed_when_it_is_loaded(bases, asked, tmp_path):
    model = _couple({name: bases[name] for name in ("anchor", "medical")})
    model.save_pretrained(tmp_path)
    asked.clear()
    rc_agents.CoupledForCausalLM.from_pretrained(
        tmp_path, device_map={"medical": "cpu"}, dtype={"anchor": "bfloat16"}
    )
    assert asked["gpt2"]["device_map"] == "cpu"
    assert asked["llama"]["dtype"] == "bfloat16"


# Virtual devices.


def _home(bases, devices, topology="multi_bilateral", **settings):
    """Each model on a device of its own."""
    places = dict(zip(ARCHS, devices, strict=True))
    return _couple(bases, device_map=places, topology=topology, **settings), places


def test_bridges_live_with_their_targets(bases):
    with virtual_devices(3) as devices:
        model, places = _home(bases, devices)
        for edge in model.edges:
            for site in range(len(model.sites)):
                found = {one.device for one in model.bridge(edge, site).parameters()}
                assert found == {places[edge.target]}
        assert model.device == places["anchor"]


def test_a_bridge_follows_the_block_of_a_model_that_is_spread_out(bases):
    two = {name: bases[name] for name in ("anchor", "medical")}
    with virtual_devices(2) as devices:
        spread = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
        spread |= {f"model.layers.{block}": block // 2 for block in range(4)}
        spread = {part: devices[index] for part, index in spread.items()}
        model = _couple(two, device_map={"anchor": spread, "medical": devices[1]})
        assert [row[0] for row in model.sites] == [2, 4]
        for site in (0, 1):
            bridge = model.bridge(("medical", "anchor"), site)
            assert bridge.map.weight.device == devices[site]
        ids = prompts(B, T)
        out = model(ids.to(devices[0])).logits
        torch.testing.assert_close(out.cpu(), _couple(two)(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["lockstep", "threads"])
def test_the_numbers_are_those_of_one_device(bases, schedule):
    ids, one = prompts(B, T), _couple(bases)
    with virtual_devices(3) as devices:
        model, places = _home(bases, devices, schedule=schedule)
        there = ids.to(places["anchor"])
        out = model(there)
        assert out.logits.device == places["anchor"]
        torch.testing.assert_close(out.logits.cpu(), one(ids).logits, rtol=1e-4, atol=1e-5)
        new = model.generate(there, max_new_tokens=4, **GREEDY)
        assert torch.equal(new.cpu(), one.generate(ids, max_new_tokens=4, **GREEDY))


def _states(model, places, tokens):
    """One hidden state an edge and a site."""
    return Counter(
        Transfer(
            places[edge.source],
            places[edge.target],
            (B, tokens, WIDTHS[edge.source]),
            torch.float32,
        )
        for edge in model.edges
        for _ in model.sites
    )


@pytest.mark.parametrize(
    ("topology", "sites"),
    [("unilateral", 1), ("star_bilateral", 1), ("multi_bilateral", 3), (CHAIN, 2)],
    ids=str,
)
def test_one_state_an_edge_and_site_crosses_and_nothing_else(bases, topology, sites):
    with virtual_devices(3) as devices:
        model, places = _home(bases, devices, topology, sites=sites)
        ids = prompts(B, T).to(places["anchor"])
        devices.transfers.clear()
        out = model(ids, use_cache=True)
        inputs = Counter(
            Transfer(places["anchor"], places[name], (B, T), torch.int64)
            for name in model.specialists
        )
        assert Counter(devices.between()) == _states(model, places, T) + inputs
        assert not devices.between(CPU, places["anchor"])
        devices.transfers.clear()
        model(ids[:, :1], past_key_values=out.past_key_values)
        tokens_and_places = Counter(
            Transfer(places["anchor"], places[name], (B, 1), torch.int64)
            for name in model.specialists
            for _ in range(2)
        )
        assert Counter(devices.between()) == _states(model, places, 1) + tokens_and_places


def test_a_disabled_model_is_sent_nothing(bases):
    with virtual_devices(3) as devices:
        model, places = _home(bases, devices)
        ids = prompts(B, T).to(places["anchor"])
        devices.transfers.clear()
        with model.disabled("law"):
            model(ids)
        assert devices.between()
        assert not [one for one in devices.transfers if places["law"] in (one.source, one.target)]


def test_gradients_reach_bridges_on_every_device(bases):
    with virtual_devices(3) as devices:
        model, places = _home(bases, devices)
        ids = prompts(B, T).to(places["anchor"])
        model(ids, labels=ids).loss.backward()
        for edge in model.edges:
            gradient = model.bridge(edge, 0).map.weight.grad
            assert gradient.device == places[edge.target]
            assert gradient.cpu().abs().sum() > 0


def test_routers_live_with_the_anchor(tmp_path):
    kind = rc_agents.BridgeConfig(kind="moe")
    equal = {name: saved(tmp_path, arch, "prose", width=32) for name, arch in ARCHS.items()}
    ids, one = prompts(B, T), _couple(equal, bridge=kind)
    with virtual_devices(3) as devices:
        model, places = _home(equal, devices, bridge=kind)
        there = ids.to(places["anchor"])
        devices.transfers.clear()
        out = model(there)
        state = (B, T, 32), torch.float32
        crossed = Counter(t for t in devices.between() if t.dtype == torch.float32)
        assert crossed == Counter(
            Transfer(*ends, *state)
            for name in model.specialists
            for ends in [(places[name], places["anchor"]), (places["anchor"], places[name])]
            for _ in model.sites
        )
        torch.testing.assert_close(out.logits.cpu(), one(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix", ["average", "learned"])
def test_mixed_logits_meet_at_the_anchor(bases, mix):
    ids, one = prompts(B, T), _couple(bases, mix=mix)
    with virtual_devices(3) as devices:
        model, places = _home(bases, devices, mix=mix)
        out = model(ids.to(places["anchor"])).logits
        assert out.device == places["anchor"]
        torch.testing.assert_close(out.cpu(), one(ids).logits, rtol=1e-4, atol=1e-5)


def test_loaded_models_may_be_moved_before_they_are_coupled():
    with virtual_devices(2) as devices:
        members = [tiny("llama").to(devices[0]), tiny("gpt2").to(devices[1])]
        model = rc_agents.couple(members[0], {"medical": members[1]}, alignment="shared", sites=2)
        wake(model)
        assert model.bridge(("medical", "anchor"), 0).map.weight.device == devices[0]
        assert model(prompts().to(devices[0])).logits.device == devices[0]


@pytest.mark.parametrize(("schedule", "gate"), [("lockstep", "scalar"), ("threads", "token")])
def test_nobody_waits_for_a_device_once_all_models_have_begun(bases, schedule, gate):
    with virtual_devices(3) as devices:
        bridge = {"gate": gate}
        model, places = _home(bases, devices, schedule=schedule, bridge=bridge, sites=3)
        ids = prompts(B, T).to(places["anchor"])
        mask = torch.ones(B, T + 1, dtype=torch.long).to(ids.device)
        cache = model(ids, attention_mask=mask[:, :T], use_cache=True).past_key_values
        started, waits = [], []

        def begin(*_):  # what a model reads of its mask before its first block does not count
            devices.reads.clear()
            devices.transfers.clear()
            started.append(True)

        def end(*_):
            waits[:] = devices.reads + [one for one in devices.transfers if one.target == CPU]

        hooks = [
            backbone.find_blocks(one)[0].register_forward_pre_hook(begin)
            for one in model.models.values()
        ]
        hooks += [
            backbone.find_blocks(one)[-1].register_forward_hook(end)
            for one in model.models.values()
        ]
        try:
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        finally:
            for hook in hooks:
                hook.remove()
        assert len(started) == 3
        assert waits == []
