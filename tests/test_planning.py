"""Who gets which device, what it takes there, and what then crosses."""

import itertools
import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

import rc_agents
from rc_agents import Machine, ModelRef
from rc_agents.errors import ConfigError, ModelError
from rc_agents.planning.sharing import Unit, place_of, share, weights_on
from rc_agents.planning.sizes import measure
from tests.ensembles import GREEDY, prompts, wake
from tests.tiny import RECIPES, saved, tiny
from tests.tiny_tokenizers import tiny_tokenizer
from tests.virtual_device import virtual_devices

pytestmark = pytest.mark.tiny

ARCHS = {"anchor": "llama", "medical": "gpt2", "law": "qwen2"}
TIGHT = ("820kB", "820kB", "300kB")
"""All models fit, but the largest fits on no device."""
PAIRS = [((0, 1), 300), ((2, 3), 300), ((0, 2), 10), ((0, 3), 10), ((1, 2), 10), ((1, 3), 10)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: saved(folder, arch, "prose") for name, arch in ARCHS.items()}


def _plan(bases, machine, **settings):
    specialists = {name: path for name, path in bases.items() if name != "anchor"}
    return rc_agents.plan(
        bases["anchor"], specialists, machine=machine, **{"tokens": 0, "sites": 2, **settings}
    )


def _couple(bases, **settings):
    specialists = {name: path for name, path in bases.items() if name != "anchor"}
    same = dict.fromkeys(bases, tiny_tokenizer("prose"))
    model = rc_agents.couple(
        bases["anchor"], specialists, **{"sites": 2, "tokenizers": same, **settings}
    )
    wake(model)
    return model


# Sizes.


@pytest.mark.parametrize("arch", [arch for arch in RECIPES if arch != "qwen3_moe"])
def test_a_skeleton_weighs_what_the_model_weighs(arch):
    dtype = torch.bfloat16 if arch == "mixtral" else None  # its experts' kernel takes no other
    model = tiny(arch).to(dtype)
    size = measure(arch, model.config, dtype, False)
    held = (*model.parameters(), *model.buffers())
    # Buffers keep their float32 where a model is made in bfloat16.
    weight = sum(one.numel() * one.element_size() for one in held)
    assert size.weight_bytes == pytest.approx(weight, rel=1e-3)
    grown = []
    for tokens in (8, 16):
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), past_key_values=cache) if (
            "mamba" not in arch and arch != "bamba"
        ) else None
        grown.append(sum(one.keys.nbytes + one.values.nbytes for one in cache.layers if _kv(one)))
    if "mamba" not in arch and arch != "bamba":
        assert size.cache_bytes == (grown[1] - grown[0]) // 8
    assert all(one.is_meta for one in size.skeleton.parameters())


def _kv(layer):
    return isinstance(getattr(layer, "keys", None), torch.Tensor)


def test_a_cache_that_a_skeleton_cannot_run_is_unknown():
    size = measure("moe", tiny("qwen3_moe").config, None, False)
    assert size.cache_bytes is None
    assert size.weight_bytes > 0


def test_a_quantized_model_is_counted_in_its_bits():
    config = tiny("llama").config
    whole = measure("a", config, None, False)
    linear = sum(
        m.weight.numel()
        for name, m in whole.skeleton.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    )
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert whole.weight_bytes - measure("a", config, None, False).weight_bytes == linear * 3.5


# Sharing.


def test_models_are_balanced_over_devices(bases):
    plan = _plan(bases, "3x10MB")
    assert sorted(plan.device_map.values()) == [0, 1, 2]
    plan = _plan(bases, "2x10MB")
    assert plan.device_map["medical"] != plan.device_map["anchor"] == plan.device_map["law"]
    assert plan.used == {
        place: sum(
            sum(one.weights.values()) + one.bridge_bytes
            for one in plan.models
            if one.device_map == place
        )
        for place in plan.used
    }


def test_the_larger_device_takes_the_larger_share(bases):
    plan = _plan(bases, {0: "30MB", 1: "1.0MB".replace(".0", "")})
    assert plan.used[0] > plan.used.get(1, 0)


def test_models_that_talk_stand_where_the_link_is_fast():
    links = [{"between": ends, "gb_per_s": speed, "latency_us": 5} for ends, speed in PAIRS]
    machine = {"devices": dict.fromkeys(range(4), "10MB"), "links": links}
    config = tiny("llama").config
    plan = rc_agents.plan(config, {"law": config}, machine=machine, tokens=0)
    assert {*plan.device_map.values()} in ({0, 1}, {2, 3})
    assert plan.crossings[0].seconds == pytest.approx(4 * (5e-6 + 32 * 4 / 300e9))


def test_a_model_is_split_only_where_it_does_not_fit_whole(bases):
    plan = _plan(bases, "2x1200kB")
    assert all(isinstance(place, int) for place in plan.device_map.values())
    plan = _plan(bases, dict(enumerate(TIGHT)))
    maps = plan.device_map
    assert {name for name, place in maps.items() if isinstance(place, dict)} == {"medical"}
    assert len(set(maps["medical"].values())) > 1
    assert all(plan.used[place] <= size for place, size in plan.machine.memory.items())


def test_what_no_device_holds_goes_to_memory_and_then_to_disk(bases):
    plan = _plan(bases, "2x600kB,cpu=1GB")
    away = [one.streamed_bytes for one in plan.models]
    assert sum(away) == plan.used["cpu"]
    assert all(0 < one < sum(m.weights.values()) for one, m in zip(away, plan.models, strict=True))
    plan = _plan(bases, "2x600kB,cpu=400kB,disk=1GB")
    assert plan.used["disk"] > 0
    assert plan.used["cpu"] <= 400_000
    plan = _plan(bases, "cpu=1GB")
    assert set(plan.device_map.values()) == {"cpu"}
    assert not plan.crossings


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ("1x10kB", "do not fit.*need 1.* MB.*'medical'.*add 'cpu' and 'disk'"),
        ("2xlots", "memory of device 0 is 'lots'"),
        ("80GiB", "expected parts such as '2x80GiB'"),
        ({"devices": {0: 1}, "link": []}, "unknown key 'link'.*did you mean 'links'"),
        (
            {"devices": {0: 1}, "links": [{"between": [0, 7], "gb_per_s": 1}]},
            "unknown device 7; known: 0",
        ),
        ({"devices": {0: 1}, "links": [{"between": [0]}]}, "a link is"),
        ({}, "devices are empty"),
        (3, "devices are a mapping or text"),
    ],
)
def test_a_machine_that_cannot_be_is_one_clear_line(bases, machine, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _plan(bases, machine)
    assert "\n" not in str(caught.value)


def test_caches_and_rows_need_room(bases):
    with pytest.raises(ConfigError, match="caches of 1000 tokens"):
        _plan(bases, "2x1100kB", tokens=1000, rows=8)
    plan, more = (_plan(bases, "2x100MB", tokens=n) for n in (0, 100))
    cache = sum(one.cache_bytes_per_token for one in plan.models)
    assert sum(more.used.values()) - sum(plan.used.values()) == pytest.approx(100 * cache, abs=100)


def test_adapters_over_one_base_lie_together_and_weigh_once(bases):
    base = str(bases["anchor"])
    twins = {name: ModelRef(base=base, adapter=f"{name}-adapter") for name in ("law", "code")}
    plan = rc_agents.plan(base, twins, machine="3x10MB", tokens=0)
    assert len(set(plan.device_map.values())) == 1
    assert [one.shares_with for one in plan.models] == [None, "anchor", "anchor"]
    alone = rc_agents.plan(base, machine="3x10MB", tokens=0)
    bridges = sum(one.bridge_bytes for one in plan.models)
    assert sum(plan.used.values()) - bridges == pytest.approx(sum(alone.used.values()), abs=100)


def test_a_settled_model_keeps_its_place_and_its_share(bases):
    plan = _plan(bases, "2x1200kB", device_map={"anchor": 1, "law": 1})
    assert plan.device_map == {"anchor": 1, "law": 1, "medical": 0}


def test_a_loaded_model_is_planned_around():
    machine = {"cpu": "1GB", 0: "10MB"}
    plan = rc_agents.plan(tiny("llama"), {"law": tiny("qwen2").config}, machine=machine, tokens=0)
    assert plan.device_map["law"] == 0
    assert plan.models[0].weights == {"cpu": plan.used["cpu"] - plan.models[0].bridge_bytes}


def test_a_saved_ensemble_is_planned_from_its_config(bases, tmp_path):
    _couple(bases, topology="unilateral").save_pretrained(tmp_path)
    expected = _plan(bases, "2x10MB", topology="unilateral")
    found = rc_agents.plan(tmp_path, machine="2x10MB", tokens=0)
    assert found == expected
    assert json.loads(json.dumps(found.to_dict()))["device_map"] == found.device_map


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="'law': no configuration at"):
        rc_agents.plan(tiny("llama").config, {"law": tmp_path / "none"}, machine="1x1GB")


SIZES = [measure(name, tiny(arch).config, None, False) for name, arch in ARCHS.items()]


@given(
    st.lists(st.integers(0, 1_500_000), min_size=0, max_size=3),
    st.integers(0, 3_000_000),
    st.integers(0, 100_000),
)
@settings(max_examples=40, deadline=None)
def test_every_weight_has_a_place_and_no_device_holds_more_than_it_has(devices, cpu, beside):
    units = [Unit(names=(size.name,), size=size, beside=beside) for size in SIZES]
    free = dict(enumerate(devices)) | {"cpu": cpu}
    homes = list(range(len(devices))) or ["cpu"]
    maps = share(units, homes, free, lambda homes: 0.0)
    assert sorted(maps) == sorted(ARCHS)
    used = Counter()
    for size in SIZES:
        places = maps[size.name]
        for name in size.tensors:
            assert place_of(places, name) in (*homes, "cpu", "disk")
        used.update(weights_on(size, places))
    assert all(used[place] <= free[place] for place in homes if place != "cpu")


# In use.


def test_auto_shares_the_devices_instead_of_filling_the_first(bases):
    ids, one = prompts(), _couple(bases)
    with virtual_devices(2) as devices:
        budget = {str(device): "3MB" for device in devices}
        model = _couple(bases, device_map="auto", max_memory=budget)
        found = {name: {p.device for p in m.parameters()} for name, m in model.models.items()}
        assert all(len(places) == 1 for places in found.values())
        assert set.union(*found.values()) == set(devices)
        out = model(ids.to(model.device)).logits
        torch.testing.assert_close(out.cpu(), one(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["lockstep", pytest.param("threads", marks=pytest.mark.slow)])
def test_models_split_over_devices_give_the_numbers_of_one_device(bases, schedule):
    ids, one = prompts(), _couple(bases)
    with virtual_devices(3) as devices:
        plan = _plan(bases, dict(zip(map(str, devices), TIGHT, strict=True)))
        model = _couple(bases, device_map=plan.device_map, schedule=schedule)
        assert len({p.device for p in model.models["medical"].parameters()}) > 1
        there = ids.to(model.device)
        out = model(there)
        torch.testing.assert_close(out.logits.cpu(), one(ids).logits, rtol=1e-4, atol=1e-5)
        new = model.generate(there, max_new_tokens=4, **GREEDY)
        assert torch.equal(new.cpu(), one.generate(ids, max_new_tokens=4, **GREEDY))


@pytest.mark.parametrize("memory", [("3MB", "3MB", "3MB"), TIGHT], ids=["whole", "split"])
def test_what_crosses_is_what_was_planned(bases, memory):
    """Hidden states of the plan's edges and nothing else as wide."""
    with virtual_devices(3) as devices:
        plan = _plan(bases, dict(zip(map(str, devices), memory, strict=True)))
        model = _couple(bases, device_map=plan.device_map)
        ids = prompts(1, 6).to(model.device)
        cache = model(ids[:, :5], use_cache=True).past_key_values
        devices.transfers.clear()
        model(ids[:, 5:], past_key_values=cache)
        crossed = Counter()
        for one in devices.between():
            if one.dtype == torch.float32 and len(one.shape) == 3:
                crossed[str(one.source), str(one.target)] += one.num_bytes
    planned = Counter()
    for one in plan.crossings:
        planned[one.source, one.target] += one.num_bytes
    assert crossed == planned


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_model_gives_the_same_bits(bases, place, tmp_path):
    ids, one = prompts(), _couple(bases)
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    layers = {f"model.layers.{block}": place if block % 2 else "cpu" for block in range(4)}
    model = _couple(
        bases,
        device_map={"anchor": parts | layers | {"lm_head": place}, "law": place},
        offload_folder=tmp_path,
    )
    assert any(p.is_meta for p in model.models["law"].parameters()) == (place == "disk")
    assert torch.equal(model(ids).logits, one(ids).logits)
    new = model.generate(ids, max_new_tokens=4, **GREEDY)
    assert torch.equal(new, one.generate(ids, max_new_tokens=4, **GREEDY))
    assert model.base_fingerprint() == one.base_fingerprint()


def test_an_offloaded_model_is_carried_to_its_device_layer_by_layer(bases):
    ids, one = prompts(), _couple(bases)
    with virtual_devices(1) as devices:
        plan = _plan(bases, {str(devices[0]): "900kB", "cpu": "1GB"})
        away = {m.name: m.streamed_bytes for m in plan.models if len(m.weights) > 1}
        assert away
        model = _couple(bases, device_map=plan.device_map)
        devices.transfers.clear()
        out = model(ids.to(model.device)).logits
        torch.testing.assert_close(out.cpu(), one(ids).logits, rtol=1e-4, atol=1e-5)
        weights = {(48, 144), (48, 192), (192, 48), (40, 40), (80, 40), (40, 80)}
        carried = [
            t
            for t in devices.between(devices[0], "cpu")
            if t.shape in weights and t.source.type == "cpu"
        ]
        assert carried


def test_auto_for_one_model_leaves_the_others_where_they_are_put(bases):
    with virtual_devices(2) as devices:
        first, second = map(str, devices)
        model = _couple(
            bases,
            device_map={"anchor": first, "medical": first, "law": "auto"},
            max_memory={first: "2MB", second: "2MB"},
        )
        places = {name: str(one.device) for name, one in model.models.items()}
        assert places == {"anchor": first, "medical": first, "law": second}


def test_a_saved_ensemble_is_shared_out_when_it_is_loaded(bases, tmp_path):
    _couple(bases).save_pretrained(tmp_path)
    with virtual_devices(2) as devices:
        budget = {str(device): "3MB" for device in devices}
        model = rc_agents.CoupledForCausalLM.from_pretrained(
            tmp_path, device_map="auto", max_memory=budget
        )
        assert {one.device for one in model.models.values()} == set(devices)


def test_max_memory_without_auto_is_refused(bases):
    with pytest.raises(ConfigError, match="max_memory has no effect with device_map='cpu'"):
        _couple(bases, device_map="cpu", max_memory={"cpu": "1GB"})


def test_a_description_may_come_from_a_file(bases, tmp_path):
    file = tmp_path / "machine.json"
    links = [{"between": [0, 1], "gb_per_s": 25, "latency_us": 10}]
    file.write_text(json.dumps({"devices": {"0": "1GB", "1": "1GB"}, "links": links}))
    machine = Machine.of(file)
    assert machine == Machine.of({"devices": {0: 10**9, 1: 10**9}, "links": links})
    assert machine.link(1, 0).seconds(25_000) == pytest.approx(11e-6)
    assert {one.seconds is None for one in _plan(bases, machine).crossings} == {False}
    assert Machine.of("2x80GiB,cpu=1TB").memory == {0: 80 * 2**30, 1: 80 * 2**30, "cpu": 10**12}
    assert list(itertools.islice(Machine.of(None).memory, 0, 1)) == [Machine.of(None).homes[0]]


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    peft = pytest.importorskip("peft", reason="adapters need PEFT")
    base = AutoModelForCausalLM.from_pretrained(bases["anchor"])
    kind = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(base, kind).save_pretrained(folder)
    return folder


def test_an_adapter_follows_its_base_over_devices(bases, adapter):
    law = {"law": ModelRef(base=str(bases["anchor"]), adapter=str(adapter))}
    layers = {f"model.layers.{block}": f"vgpu:{block // 2}" for block in range(4)}
    ends = {"model.embed_tokens": "vgpu:0", "model.rotary_emb": "vgpu:0"}
    spread = layers | ends | {"model.norm": "vgpu:1", "lm_head": "vgpu:1"}
    ids, one = prompts(), rc_agents.couple(bases["anchor"], law, sites=2)
    wake(one)
    with virtual_devices(2):
        model = rc_agents.couple(
            bases["anchor"], law, sites=2, device_map=dict.fromkeys(("anchor", "law"), spread)
        )
        wake(model)
        out = model(ids.to(model.device)).logits
        torch.testing.assert_close(out.cpu(), one(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_over_an_offloaded_base_is_refused(bases, adapter):
    law = {"law": ModelRef(base=str(bases["anchor"]), adapter=str(adapter))}
    with pytest.raises(ModelError, match="'law': an adapter does not go onto a base"):
        rc_agents.couple(bases["anchor"], law, sites=2, device_map="disk")
