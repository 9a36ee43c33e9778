"""Bridges that read what their source would say next, and edges with bridges of another form."""

import pytest
import torch

import rc_agents
from rc_agents import BridgeConfig
from rc_agents.backbone import Lens
from rc_agents.errors import ConfigError, TokenError
from tests.ensembles import GREEDY, prompts
from tests.tiny import tiny

SAYS = BridgeConfig(
    gate="fixed", start="identity", update="blend", reads="prediction", normalize_source=False
)
HEARD = BridgeConfig(gate="fixed", start="default", normalize_source=False)


def chain(**changes):
    """first -> second -> anchor: the second model reads at its beginning what the first one says at its end."""
    settings = {
        "topology": [("first", "second"), ("second", "anchor")],
        "sites": [
            {"anchor": 1, "first": 4, "second": 1},
            {"anchor": 4, "first": 4, "second": 4},
        ],
        "bridge": HEARD,
        "edge_bridges": {("first", "second"): SAYS},
        "alignment": "shared",
    }
    others = {"first": tiny("gpt2", seed=1, layers=4), "second": tiny("llama", seed=2, layers=4)}
    return rc_agents.couple(tiny("llama", layers=4), others, **settings | changes)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "cohere", "opt"])
def test_a_lens_on_the_last_states_gives_the_models_own_logits(arch):
    model, ids = tiny(arch), prompts()
    kept = []
    handle = rc_agents.backbone.find_blocks(model)[-1].register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    handle.remove()
    found = Lens(model)(kept[0].flatten(0, 1))
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_the_second_model_goes_on_from_the_first_ones_words():
    model, ids, entered = chain(), prompts(), {}
    first, second = model.models["first"], model.models["second"]
    with model.untapped("first"), torch.no_grad():
        said = first(ids).logits.softmax(-1) @ second.get_input_embeddings().weight
    handle = second.model.layers[1].register_forward_hook(
        lambda module, args, output: entered.setdefault("states", args[0])
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    torch.testing.assert_close(entered["states"], said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", ["lockstep", "threads"])
def test_a_model_that_stands_still_is_read_at_its_end_twice(schedule):
    topology = [("first", "second"), ("second", "anchor"), ("first", "anchor")]
    model, ids = chain(topology=topology, schedule=schedule), prompts()
    read = []
    for site in (0, 1):
        model.bridge(("first", "anchor"), site).register_forward_pre_hook(
            lambda module, args: read.append(args[0].detach().clone())
        )
    with torch.no_grad():
        model(ids)
    assert torch.equal(*read)
    cached = model.generate(ids, max_new_tokens=5, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=5, use_cache=False, **GREEDY), cached)


def test_each_edge_keeps_its_form_when_saved_and_loses_it_when_removed(tmp_path):
    model, ids = chain(), prompts()
    forms = {edge: model.config.bridge_form(edge) for edge in model.edges}
    assert forms == {("first", "second"): SAYS, ("second", "anchor"): HEARD}
    names = [name for name, _ in model.bridges.named_parameters()]
    assert all(name.split(".")[2:] == ["map", "weight"] for name in names)
    model.save_pretrained(tmp_path / "saved", include_bases=True)
    again = rc_agents.CoupledForCausalLM.from_pretrained(tmp_path / "saved")
    assert {edge: again.config.bridge_form(edge) for edge in again.edges} == forms
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    again.remove_specialist("second")
    assert again.config.edge_bridges == {}


def test_the_map_learns_and_the_frozen_models_do_not():
    model = chain()
    model(prompts()).logits.logsumexp(-1).sum().backward()
    grads = {name for name, value in model.named_parameters() if value.grad is not None}
    assert "bridges.first__second.0.map.weight" in grads
    assert not [name for name in grads if not name.startswith("bridges.")]


def test_forms_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="'first' -> 'anchor', which is no edge"):
        chain(edge_bridges={("first", "anchor"): SAYS})
    with pytest.raises(ConfigError, match="leave edge_bridges out"):
        chain(edge_bridges={("first", "second"): BridgeConfig(kind="moe")})
    with pytest.raises(
        TokenError, match="needs one vocabulary at both ends of 'first' -> 'second'"
    ):
        chain(alignment="clamp")
    with pytest.raises(ConfigError, match="unknown reads"):
        BridgeConfig(reads="words")
