"""Sites that name a block for each model: read late, heard early."""

import pytest
import torch

import rc_agents
from rc_agents.alignment import site_rows
from rc_agents.errors import ConfigError
from tests.tiny import tiny

DEPTHS = {"anchor": 6, "one": 12, "two": 6}


def test_left_out_models_stand_where_the_anchor_says():
    assert site_rows([{"anchor": 2, "one": 11}, {"anchor": 6}], DEPTHS) == [[2, 11, 2], [6, 12, 6]]
    assert site_rows([3, 6], DEPTHS) == [[3, 6, 3], [6, 12, 6]]


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([{"one": 3}], "names the anchor's block too"),
        ([{"anchor": 3}, 6], "names the anchor's block too"),
        ([{"anchor": 3, "three": 1}], "unknown model 'three'"),
        ([{"anchor": 3, "one": 13}], r"sites \[13\] lie outside the blocks 1..12 of 'one'"),
        ([{"anchor": 5, "one": 9}, {"anchor": 3, "one": 9}], "must not go back"),
        ([{"anchor": 3, "one": 9}, {"anchor": 3, "one": 9}], "two sites are the same"),
        ([{"anchor": True}], "got True for 'anchor'"),
    ],
)
def test_what_cannot_be_met_is_said_in_one_line(sites, message):
    with pytest.raises(ConfigError, match=message):
        site_rows(sites, DEPTHS)


@pytest.fixture
def model():
    anchor, other = tiny("llama", layers=4), tiny("gpt2", layers=6)
    bridge = rc_agents.BridgeConfig(gate="fixed", start="default")
    return rc_agents.couple(
        anchor,
        {"other": other},
        topology="unilateral",
        alignment="shared",
        sites=[{"anchor": 1, "other": 5}],
        bridge=bridge,
    )


def test_the_anchor_hears_early_what_the_specialist_says_late(model):
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    anchor, other = model.models["anchor"], model.models["other"]
    with model.untapped("other"), torch.no_grad():
        late = other(ids, output_hidden_states=True).hidden_states[5]
    bridge = model.bridge(("other", "anchor"), 0)

    def hears(module, arguments, output):
        early = output[0] if isinstance(output, tuple) else output
        heard = early + bridge(late, early)
        return (heard, *output[1:]) if isinstance(output, tuple) else heard

    found = model(ids).logits
    handle = anchor.model.layers[0].register_forward_hook(hears)
    with model.untapped("anchor"), torch.no_grad():
        expected = anchor(ids).logits
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_generates_with_its_cache_as_without(model):
    ids = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_a_later_specialist_stands_where_the_anchor_says(model):
    model.add_specialist("later", tiny("llama", layers=4, seed=1), alignment="shared")
    assert model.config.site_layers == [[1, 5, 1]]
