"""Single models: their blocks are found, taps answer their own ensemble, misfits are refused."""

import copy
import gc

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, GPT2Model, PreTrainedModel, T5Config
from transformers import AutoModelForCausalLM as Auto
from transformers import AutoModelForSeq2SeqLM as Seq2Seq

import rc_agents
from rc_agents import backbone
from rc_agents.errors import ModelError
from tests.ensembles import ensemble, frozen_logits, prompts, wake
from tests.tiny import TINY, tiny, tiny_config

pytestmark = pytest.mark.tiny

IDENTITY = rc_agents.BridgeConfig(start="identity")


@pytest.mark.parametrize("arch", TINY)
def test_the_blocks_are_found(arch):
    model = tiny(arch)
    assert backbone.num_blocks(model) == model.config.num_hidden_layers
    hidden = model(prompts(), output_hidden_states=True).hidden_states
    assert backbone.stream_width(model) == hidden[0].shape[-1]


def test_a_list_inside_a_block_is_no_list_of_blocks():
    model = tiny("llama", layers=4)
    model.model.layers[0].mlp.experts = nn.ModuleList(nn.Identity() for _ in range(4))
    assert backbone.find_blocks(model) is model.model.layers


def test_one_loaded_model_takes_part_in_two_ensembles():
    members, ids = [tiny("llama"), tiny("gpt2")], prompts()
    made = []
    for sites in (2, [1, 3]):
        one = rc_agents.couple(members[0], {"b": members[1]}, alignment="shared", sites=sites)
        wake(one)
        made.append(one)
    for one, sites in zip(made, (2, [1, 3]), strict=True):
        alone = rc_agents.couple(
            tiny("llama"), {"b": tiny("gpt2")}, alignment="shared", sites=sites
        )
        wake(alone)
        assert torch.equal(one(ids).logits, alone(ids).logits)
    assert torch.equal(members[0](ids).logits, tiny("llama")(ids).logits)


def test_a_loaded_model_is_free_again_when_its_ensemble_is_gone():
    members = [tiny("llama"), tiny("gpt2")]

    def taps():
        gc.collect()
        hooks = (one._forward_hooks for member in members for one in member.modules())
        return sum(len(one) for one in hooks)

    before = taps()
    model = rc_agents.couple(members[0], {"b": members[1]}, alignment="shared", sites=2)
    assert taps() == before + 4
    del model
    assert taps() == before
    with pytest.raises(ValueError, match="equal width"):
        rc_agents.couple(members[0], {"b": members[1]}, alignment="shared", bridge=IDENTITY)
    assert taps() == before


def test_one_loaded_model_may_be_anchor_and_specialist():
    member, ids = tiny("llama"), prompts()
    model = rc_agents.couple(member, {"twin": member}, alignment="shared", sites=2)
    shared = {id(one) for one in model.lm_anchor.parameters()}
    assert {id(one) for one in model.lm_twin.parameters()} == shared
    wake(model)
    other = rc_agents.couple(tiny("llama"), {"twin": tiny("llama")}, alignment="shared", sites=2)
    wake(other)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_a_copy_of_an_ensemble_is_its_own():
    model, ids = ensemble("llama", "gpt2"), prompts()
    twin = copy.deepcopy(model)
    expected = model(ids).logits
    wake(model, seed=5)
    assert torch.equal(twin(ids).logits, expected)
    assert not torch.equal(model(ids).logits, expected)


# Refused, by type and with the reason.


def _tiny_bert():
    return {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _encoder_decoder():
    sizes = {"vocab_size": 96, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return Seq2Seq.from_config(T5Config(**sizes, d_kv=8))


def _headless():
    return AutoModel.from_config(tiny_config("llama"))


class Prefixed(GPT2Model):
    """Puts two states of its own before the tokens'."""

    def forward(self, input_ids, **kwargs):
        return super().forward(nn.functional.pad(input_ids, (2, 0)), **kwargs)


def _prefixed():
    model = tiny("gpt2")
    model.transformer.__class__ = Prefixed
    return model


def _skipping():
    model = tiny("llama")
    model.model.config = copy.copy(model.config)
    model.model.config.num_hidden_layers = 3
    return model


def _crashing():
    model = tiny("llama")
    model.model.layers[1].mlp = nn.Linear(7, 7)
    return model


def _wide():
    model = tiny("llama")
    model.model.layers[2].register_forward_hook(lambda _, args, output: output[:, :, None])
    return model


def _listless():
    model = tiny("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    return model


def _cacheless():
    model = tiny("llama")
    model.forward = lambda input_ids: None
    return model


REFUSED = {
    "encoder-decoder": (
        _encoder_decoder,
        "'t5' is not supported: it reads the text with an encoder",
    ),
    "headless": (_headless, "'llama' is not supported: it gives no logits; load it with Auto"),
    "ensemble": (lambda: ensemble("llama", "gpt2"), "is itself an ensemble; couple the models"),
    "prefixed": (_prefixed, r"its block 1 gives states of shape \(1, 5, 48\) for three tokens"),
    "skipping": (_skipping, "its forward passes the blocks 1, 2, 3, not each of 4 once"),
    "crashing": (_crashing, "three tokens through it raise RuntimeError: mat1 and mat2"),
    "wide": (_wide, r"'llama' is not supported: (its block 3 gives|three tokens)"),
    "listless": (_listless, "'llama' is not supported: expected exactly one list of 4 blocks"),
    "cacheless": (_cacheless, "'llama' is not supported: its forward takes no cache"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("role", ["anchor", "specialist"])
def test_a_model_that_cannot_couple_is_refused(case, role):
    make, message = REFUSED[case]
    members = (make(), tiny("llama")) if role == "anchor" else (tiny("llama"), make())
    with pytest.raises(ModelError, match=message) as caught:
        rc_agents.couple(members[0], {"b": members[1]}, alignment="shared", sites=1)
    assert "\n" not in str(caught.value)


def test_an_encoder_that_can_decode_couples():
    config = BertConfig(**_tiny_bert(), intermediate_size=64, is_decoder=True)
    model = Auto.from_config(config).eval()
    assert isinstance(model, PreTrainedModel)
    ids = prompts()
    one = rc_agents.couple(model, {"b": tiny("llama")}, alignment="shared", sites=1)
    assert torch.equal(one(ids).logits, frozen_logits(model, ids))


@pytest.mark.tiny
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gpt_neox", "gemma3_text"])
def test_a_folder_without_a_tokenizer_has_none(arch, tmp_path):
    tiny(arch).save_pretrained(tmp_path)
    assert backbone.load_tokenizer(rc_agents.ModelRef(base=str(tmp_path))) is None
