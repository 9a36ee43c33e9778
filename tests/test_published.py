"""The published forms (Ekin, 2026) against formulas written from the equations, in float64."""

import math

import pytest
import torch
from torch.nn.functional import pad

import rc_agents
from rc_agents import CouplingConfig
from tests.ensembles import wake
from tests.tiny import tiny

pytestmark = pytest.mark.tiny

# 0-based blocks after which the reference code meets: benchmark.py (two models), three_qa.py.
REFERENCE = {
    ("two_models", 12): [3, 6, 9],
    ("two_models", 24): [4, 8, 12, 16, 20],
    ("two_models", 36): [6, 12, 18, 24, 30],
    ("three_models", 12): [2, 4, 6, 8, 10],
}


def _norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def _gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Gpt2:
    """GPT-2 written out in float64, one block at a time."""

    def __init__(self, model):
        self.w = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.vocabulary, self.heads = model.config.vocab_size, model.config.n_head
        self.depth, self.done = model.config.n_layer, 0

    def embed(self, ids):
        ids = ids.clamp(0, self.vocabulary - 1)
        places = torch.arange(ids.shape[1])
        self.h = self.w["transformer.wte.weight"][ids] + self.w["transformer.wpe.weight"][places]

    def advance(self, blocks):
        while self.done < blocks:
            self._block({k: self.w[f"transformer.h.{self.done}.{k}"] for k in BLOCK})
            self.done += 1

    def _block(self, w):
        x = _norm(self.h, w["ln_1.weight"], w["ln_1.bias"])
        q, k, v = (x @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]).chunk(3, -1)
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(-2)
        self.h = self.h + mixed @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
        x = _norm(self.h, w["ln_2.weight"], w["ln_2.bias"])
        x = _gelu(x @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"])
        self.h = self.h + x @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]

    def logits(self, width):
        h = _norm(self.h, self.w["transformer.ln_f.weight"], self.w["transformer.ln_f.bias"])
        return pad(h @ self.w["lm_head.weight"].T, (0, width - self.vocabulary), value=-1e4)


BLOCK = [
    f"{part}.{kind}"
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
]


def _formula(model, members, ids, blocks):
    """Every model's logits, as in the reference code: h_i <- h_i + sum_j sigmoid(g_ij) W_ij h_j."""
    walkers = [Gpt2(member) for member in members]
    for walker in walkers:
        walker.embed(ids)
    for block in range(walkers[0].depth):
        for walker in walkers:
            walker.advance(int((block + 1) * walker.depth / walkers[0].depth))
        if block in blocks:
            states = [walker.h for walker in walkers]
            for i, target in enumerate(walkers):
                for j, source in enumerate(states):
                    if i != j:
                        names = model.names[j], model.names[i]
                        bridge = model.bridge(names, blocks.index(block)).state_dict()
                        gate = torch.sigmoid(bridge["gate.value"].double())
                        target.h = target.h + gate * (source @ bridge["map.weight"].double().T)
    width = max(walker.vocabulary for walker in walkers)
    return [walker.logits(width) for walker in walkers]


def _members(sizes, dtype=torch.float32):
    return [
        tiny("gpt2", layers=layers, vocab_size=vocabulary, width=32, seed=seed).to(dtype)
        for seed, (layers, vocabulary) in enumerate(sizes)
    ]


def _coupled(form, members):
    specialists = dict(zip(("b", "c"), members[1:], strict=False))
    return rc_agents.couple(members[0], specialists, **CouplingConfig.published(form))


TWO = [[(12, 96), (12, 96)], [(12, 96), (6, 130)], [(12, 130), (18, 96)], [(12, 96), (24, 80)]]
THREE = [[(12, 96), (12, 96), (12, 96)], [(12, 110), (6, 96), (24, 130)]]
each_dtype = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)]
)


@each_dtype
@pytest.mark.parametrize("sizes", TWO, ids=str)
@pytest.mark.parametrize("start", ["published", "random"])
def test_two_models_mix_both_logits(sizes, start, dtype, bound):
    members = _members(sizes, dtype)
    model = _coupled("two_models", members)
    if start == "random":
        wake(model)
    ids = torch.randint(0, sizes[0][1], (2, 11))
    first, second = _formula(model, members, ids, REFERENCE["two_models", 12])
    m = torch.sigmoid(model.mixer.value.double())
    expected = m * first + (1 - m) * second
    out = model(ids, output_steered=True)
    real = min(one.config.vocab_size for one in members)
    # Where one vocabulary ends its logit is -1e4, of which float32 keeps eight digits.
    assert (out.logits - expected)[..., :real].abs().max() < bound
    torch.testing.assert_close(out.logits.double(), expected, rtol=1e-6, atol=bound)
    for name, logits in zip(model.names, (first, second), strict=True):
        steered = out.steered_logits[name]
        assert (steered - logits[..., : steered.shape[-1]]).abs().max() < bound


@each_dtype
@pytest.mark.parametrize("sizes", THREE, ids=str)
@pytest.mark.parametrize("start", ["published", "random"])
def test_three_models_answer_with_the_anchors_logits(sizes, start, dtype, bound):
    members = _members(sizes, dtype)
    model = _coupled("three_models", members)
    if start == "random":
        wake(model)
    ids = torch.randint(0, sizes[0][1], (2, 11))
    logits = _formula(model, members, ids, REFERENCE["three_models", 12])
    out = model(ids, output_steered=True)
    assert (out.logits - logits[0][..., : sizes[0][1]]).abs().max() < bound
    for name, expected in zip(model.names, logits, strict=True):
        steered = out.steered_logits[name]
        assert (steered - expected[..., : steered.shape[-1]]).abs().max() < bound


@pytest.mark.parametrize(("form", "layers"), REFERENCE)
def test_the_models_meet_where_the_reference_does(form, layers):
    settings = CouplingConfig.published(form, layers)
    assert settings["sites"] == [block + 1 for block in REFERENCE[form, layers]]
    names = ("b",) if form == "two_models" else ("b", "c")
    members = {name: tiny("gpt2", layers=layers, width=16) for name in names}
    model = rc_agents.couple(tiny("gpt2", layers=layers, width=16), members, **settings)
    assert [row[0] for row in model.sites] == settings["sites"]


def test_the_published_start_is_linears_own_with_gates_at_minus_two():
    torch.manual_seed(0)
    model = _coupled("three_models", _members(THREE[0]))
    weights = [b.map.weight for bridges in model.bridges.values() for b in bridges]
    assert len(weights) == 6 * 5
    limit = 1 / math.sqrt(32)
    for weight in weights:
        assert 0.9 * limit < weight.abs().max() <= limit
    assert {b.gate.value.item() for bridges in model.bridges.values() for b in bridges} == {-2.0}
    assert _coupled("two_models", _members(TWO[0])).mixer.weights(["anchor", "b"]).tolist() == [
        0.5,
        0.5,
    ]


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match=r"unknown published form 'four'.*two_models"):
        CouplingConfig.published("four")
    with pytest.raises(
        ValueError, match=r"names blocks for anchors of .12, 24, 36. blocks, not 10"
    ):
        CouplingConfig.published("two_models", 10)
