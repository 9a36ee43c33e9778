"""Models in fewer bits: what a reference keeps, what transformers is asked for, and what it does to the numbers."""

import json
import sys

import pytest
import torch
from rc_agents.benchmarks.quantized import losses, ratio
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import rc_agents
from rc_agents import ModelRef, packaged
from rc_agents.errors import ConfigError, ModelError
from rc_agents.quantization import as_data, bits, loader_config
from tests.ensembles import prompts, wake
from tests.tiny import saved, tiny
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny
NEEDS = "torchao is not installed; pip install 'rc-agents[quantize]'"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {"anchor": saved(folder, "llama", "prose"), "law": saved(folder, "qwen2", "prose")}


def _couple(bases, **settings):
    same = dict.fromkeys(bases, tiny_tokenizer("prose"))
    model = rc_agents.couple(
        bases["anchor"], {"law": bases["law"]}, **{"sites": 2, "tokenizers": same, **settings}
    )
    wake(model)
    return model


def test_a_reference_keeps_a_configuration_as_plain_data():
    config = BitsAndBytesConfig(load_in_8bit=True)
    ref = ModelRef(base="a", quantization=config)
    assert ModelRef(**json.loads(json.dumps(ref.to_dict()))) == ref
    assert bits(ref.quantization) == 8
    assert type(loader_config("law", ref.quantization)) is BitsAndBytesConfig
    assert hash(ref) == hash(ModelRef(base="a"))
    assert "quantization" not in ModelRef(base="a").to_dict()


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (None, None),
        ("int8", 8),
        (BitsAndBytesConfig(load_in_4bit=True), 4),
        ({"quant_method": "gptq", "bits": 4}, 4),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}},
            },
            4,
        ),
        ({"quant_method": "quanto", "weights": "int8"}, 8),
        ({"quant_method": "fp8"}, None),
    ],
    ids=str,
)
def test_the_bits_of_a_weight_are_read_where_they_are_written(value, count):
    assert bits(value) == count


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int9", "quantization 'int9' is unknown; known: int8; did you mean 'int8'"),
        ({"load_in_8bit": True}, "needs its 'quant_method'.*got \\['load_in_8bit'\\]"),
        (8, "a configuration of transformers or its dict, got int: 8"),
    ],
)
def test_what_is_no_quantization_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        as_data(value)


def test_an_unknown_method_is_one_clear_line():
    with pytest.raises(ConfigError, match=r"'law': quantization does not fit: .*nonesuch"):
        loader_config("law", {"quant_method": "nonesuch"})


def test_a_missing_library_is_named_with_its_extra(bases, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModelError, match=r"'law': .*lacks its library.*'rc-agents\[quantize\]'"):
        _couple(bases, quantization={"law": "int8"})


def test_an_unknown_model_and_a_loaded_one_are_refused(bases):
    with pytest.raises(ConfigError, match=r"quantization names an unknown model 'lawyer'"):
        _couple(bases, quantization={"lawyer": "int8"})
    with pytest.raises(ConfigError, match="'law' was passed in loaded"):
        rc_agents.couple(
            tiny("llama"), {"law": tiny("qwen2")}, alignment="shared", quantization={"law": "int8"}
        )


@pytest.fixture
def asked(monkeypatch):
    """What each base's loader was called with, by folder name."""
    calls, load = {}, AutoModelForCausalLM.from_pretrained

    def record(path, **settings):
        calls[str(path).rsplit("/", 1)[-1].split("-")[0]] = settings
        return load(path, **{**settings, "quantization_config": None})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    return calls


def test_each_model_is_loaded_in_its_own_form_and_restored(bases, asked, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = _couple(bases, quantization={"law": config})
    assert "quantization_config" not in asked["llama"]
    assert asked["qwen2"]["quantization_config"].load_in_4bit
    model.save_pretrained(tmp_path)
    models = json.loads((tmp_path / "config.json").read_text())["models"]
    assert "quantization" not in models["anchor"]
    assert models["law"]["quantization"]["load_in_4bit"]
    asked.clear()
    loaded = rc_agents.CoupledForCausalLM.from_pretrained(tmp_path)
    assert asked["qwen2"]["quantization_config"].load_in_4bit
    assert loaded.members["law"].ref == model.members["law"].ref
    asked.clear()
    rc_agents.CoupledForCausalLM.from_pretrained(tmp_path, quantization={"law": None})
    assert "quantization_config" not in asked["qwen2"]


def test_int8_stays_near_the_whole_model_and_is_restored_to_the_bit(bases, tmp_path):
    pytest.importorskip("torchao", reason=NEEDS)
    from torchao.quantization import Int8Tensor

    precision = torch.get_float32_matmul_precision()
    ids, whole = prompts(4, 12), _couple(bases)
    model = _couple(bases, quantization={"law": "int8"})
    assert torch.get_float32_matmul_precision() == precision
    weights = [m.weight for m in model.models["law"].modules() if isinstance(m, torch.nn.Linear)]
    assert sum(isinstance(one, Int8Tensor) for one in weights) == len(weights) - 1  # not the head
    assert not any(isinstance(p, Int8Tensor) for p in model.models["anchor"].parameters())
    assert not any(p.requires_grad for p in model.models["law"].parameters())
    near, exact = model(ids).logits, whole(ids).logits
    assert not torch.equal(near, exact)
    assert (near - exact).norm() < 0.05 * exact.norm()
    with model.disabled():
        assert torch.equal(model(ids).logits, whole.models["anchor"](ids).logits)
    model(ids, labels=ids).loss.backward()
    assert model.bridge(("law", "anchor"), 0).map.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = rc_agents.CoupledForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, near)


def test_a_configuration_of_torchao_is_restored(bases, tmp_path):
    pytest.importorskip("torchao", reason=NEEDS)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    law = ModelRef(base=str(bases["law"]), quantization=config)
    model = _couple({**bases, "law": law})
    model.save_pretrained(tmp_path)
    again = rc_agents.CoupledForCausalLM.from_pretrained(tmp_path)
    ids = prompts()
    assert torch.equal(again(ids).logits, model(ids).logits)
    plan = rc_agents.plan(tmp_path, machine="1x1GB", tokens=0)
    law_bytes = sum(plan.models[1].weights.values())
    assert law_bytes < 0.6 * sum(
        rc_agents.plan(bases["law"], machine="1x1GB").models[0].weights.values()
    )


@pytest.mark.real
@pytest.mark.slow
def test_int8_keeps_the_perplexity_of_a_real_model():
    pytest.importorskip("torchao", reason=NEEDS)
    texts = packaged.text("medical")[-8:]
    models = [
        rc_agents.couple("package:smollm2-135m", dtype="float32", quantization=form)
        for form in (None, "int8")
    ]
    rows = [models[0].tokenizer(text, return_tensors="pt").input_ids[:, :32] for text in texts]
    base, other = (losses(model, rows) for model in models)
    assert base != other
    assert 0.9 < ratio(base, other, seed=0)["ratio"] < 1.1
