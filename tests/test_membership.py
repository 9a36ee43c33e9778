"""Specialists come and go: what stays keeps every bit."""

import copy
import pkgutil
import warnings

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import rc_agents
from rc_agents import BridgeConfig, CoupledForCausalLM, Edge
from rc_agents.bridges import Router
from rc_agents.config import check_name
from rc_agents.errors import ConfigError
from rc_agents.mixing import OutputMixer
from tests.ensembles import GREEDY, ensemble, own_state, prompts, wake
from tests.tiny import saved, tiny

pytestmark = pytest.mark.tiny

CUSTOM = [("medical", "anchor"), ("anchor", "medical")]
FORMS = {
    "multi": {"topology": "multi_bilateral"},
    "star": {"topology": "star_bilateral"},
    "unilateral": {"topology": "unilateral"},
    "custom": {"topology": CUSTOM},
    "token": {"bridge": BridgeConfig(gate="token")},
    "random": {"bridge": BridgeConfig(kind="random")},
    "moe": {"bridge": BridgeConfig(kind="moe"), "width": 32},
    "learned": {"mix": "learned"},
    "average": {"mix": "average"},
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def _same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@each_form
@pytest.mark.parametrize("more", [1, 2])
def test_adding_and_removing_leaves_no_trace(form, more):
    model, ids = ensemble("llama", "gpt2", **form), prompts()
    before = {
        "state": own_state(model),
        "config": copy.deepcopy(model.config.to_dict()),
        "logits": model(ids).logits,
        "modules": [name for name, _ in model.named_modules()],
        "print": model.base_fingerprint(),
    }
    for number, name in enumerate(["law", "code"][:more]):
        model.add_specialist(
            name,
            tiny("qwen2", seed=9 + number, width=form.get("width")),
            alignment="shared",
            edges=[(name, "anchor")] if form.get("topology") is CUSTOM else None,
        )
    added = own_state(model)
    _same({name: added[name] for name in before["state"]}, before["state"])
    wake(model, seed=1)
    model.load_state_dict(before["state"], strict=False)
    assert not torch.equal(model(ids).logits, before["logits"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ["law", "code"][:more][::-1]:
            model.remove_specialist(name)
    _same(own_state(model), before["state"])
    assert model.config.to_dict() == before["config"]
    assert torch.equal(model(ids).logits, before["logits"])
    assert [name for name, _ in model.named_modules()] == before["modules"]
    assert model.base_fingerprint() == before["print"]


@each_form
def test_an_added_specialist_is_as_if_coupled_from_the_start(form):
    settings = {key: value for key, value in form.items() if key != "topology"}
    topology = {} if form.get("topology") is CUSTOM else {"topology": form.get("topology")}
    settings |= {key: value for key, value in topology.items() if value is not None}
    whole = ensemble("llama", "gpt2", "qwen2", **settings)
    width = form.get("width")
    model = ensemble("llama", "gpt2", **settings)
    model.add_specialist("law", tiny("qwen2", seed=2, width=width), alignment="shared")
    model.load_state_dict(own_state(whole), strict=False)
    ids = prompts()
    assert torch.equal(model(ids).logits, whole(ids).logits)
    assert model.config.to_dict() | {"history": None} == whole.config.to_dict() | {"history": None}
    new = model.generate(ids, max_new_tokens=3, **GREEDY)
    assert torch.equal(new, whole.generate(ids, max_new_tokens=3, **GREEDY))


def test_a_new_specialist_is_silent_until_it_is_trained():
    model, ids = ensemble("llama", "gpt2", topology="unilateral"), prompts()
    before = model(ids).logits
    model.add_specialist("law", tiny("qwen2"), alignment="shared")
    assert torch.equal(model(ids).logits, before)


def test_removing_out_of_order_works_and_warns():
    model, ids = ensemble("llama", "gpt2", "qwen2"), prompts()
    with pytest.warns(UserWarning, match="'medical' is removed out of order: .*law->anchor"):
        model.remove_specialist("medical")
    assert model.names == ["anchor", "law"]
    assert model.edges == (Edge("law", "anchor"), Edge("anchor", "law"))
    rest = ensemble("llama", "gpt2", "qwen2")
    with rest.disabled("medical"):
        assert torch.equal(model(ids).logits, rest(ids).logits)
    new = model.generate(ids, max_new_tokens=3, **GREEDY)
    assert torch.equal(new, model.generate(ids, max_new_tokens=3, use_cache=False, **GREEDY))


def test_removing_what_came_before_the_others_bridges_does_not_warn():
    """The bridges law <-> anchor were made after medical had gone."""
    model = ensemble("llama", "gpt2")
    model.remove_specialist("medical")
    model.add_specialist("law", tiny("qwen2"), alignment="shared")
    model.add_specialist("code", tiny("gpt2"), alignment="shared")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.remove_specialist("code")
        model.remove_specialist("law")
    assert model.names == ["anchor"]
    assert torch.equal(model(prompts()).logits, tiny("llama")(prompts()).logits)


def test_a_removed_model_runs_by_itself_again():
    member, ids = tiny("gpt2"), prompts()
    model = rc_agents.couple(tiny("llama"), {"medical": member}, alignment="shared")
    wake(model)
    model.remove_specialist("medical")
    assert not any(module._forward_hooks for module in member.modules())
    assert torch.equal(member(ids).logits, tiny("gpt2")(ids).logits)


def test_a_refused_specialist_leaves_the_ensemble_as_it_was():
    model, ids = ensemble("llama", "gpt2"), prompts()
    before, state, config = model(ids).logits, own_state(model), model.config.to_dict()
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="too few for this ensemble's 2 sites"):
        model.add_specialist("law", tiny("llama", layers=1), alignment="shared")
    with pytest.raises(ValueError, match="has no config"):
        model.add_specialist("law", tiny("llama"), bridges="tests", alignment="shared")
    assert [name for name, _ in model.named_modules()] == modules
    assert model.config.to_dict() == config
    _same(own_state(model), state)
    assert torch.equal(model(ids).logits, before)


# Stages of an addition: the form of the ensemble, what else is passed, what fails, at which call.
STAGES = {
    "topology": ({}, {}, "rc_agents.membership.custom_topology", 1),
    "loading": ({}, {}, "rc_agents.assembly.Loader.add", 1),
    "alignment": ({}, {}, "rc_agents.membership.alignment_of", 1),
    "layers": ({}, {}, "rc_agents.membership.specialist_layers", 1),
    "mix": ({}, {}, "rc_agents.membership.check_mix", 1),
    "widths": (FORMS["moe"], {}, "rc_agents.membership.check_widths", 1),
    "bridges": ({}, {}, "rc_agents.modeling.parts.Bridge", 4),
    "some bridges": ({}, {"edges": [("law", "anchor")]}, "rc_agents.modeling.parts.Bridge", 2),
    "saved bridges": ({}, {"bridges": "x"}, "rc_agents.checkpoint.load_edges", 1),
    "rows": (FORMS["moe"], {}, "rc_agents.bridges.Router.new_row", 2),
    "value": (FORMS["learned"], {}, "rc_agents.mixing.OutputMixer.new_value", 1),
    "taps": (FORMS["learned"], {}, "rc_agents.backbone.tap", 1),
}


class _Failure(BaseException):
    """Not even an `Exception`: a user may press a key while a model loads."""


@pytest.mark.parametrize("stage", STAGES)
def test_an_addition_that_fails_halfway_leaves_the_ensemble_as_it_was(stage, monkeypatch):
    form, more, place, last = STAGES[stage]
    model, ids = ensemble("llama", "gpt2", **form), prompts()
    members, config = dict(model.members), copy.deepcopy(model.config.to_dict())
    before, state, same = model(ids).logits, own_state(model), model.config
    modules = [name for name, _ in model.named_modules()]
    new, calls = tiny("qwen2", seed=5, width=form.get("width")), []
    original = pkgutil.resolve_name(place)

    def fail(*arguments, **settings):
        calls.append(place)
        if len(calls) == last:
            raise _Failure
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(_Failure):
            model.add_specialist("law", new, alignment="shared", **more)
    assert model.members == members
    assert model.config is same
    assert model.config.to_dict() == config
    assert [name for name, _ in model.named_modules()] == modules
    assert not any(module._forward_hooks for module in new.modules())
    _same(own_state(model), state)
    assert torch.equal(model(ids).logits, before)
    model.add_specialist("law", new, alignment="shared")
    assert model(ids).logits.shape == before.shape


def test_a_saved_specialist_comes_with_its_bridges(tmp_path):
    paths = [saved(tmp_path / str(k), arch, "prose") for k, arch in enumerate(["llama", "gpt2"])]
    trained = rc_agents.couple(paths[0], {"medical": paths[1]}, sites=2)
    wake(trained)
    trained.save_pretrained(tmp_path / "pack")
    model = rc_agents.couple(paths[0], sites=2)
    model.add_specialist("medical", paths[1], bridges=tmp_path / "pack")
    ids = prompts()
    assert torch.equal(model(ids).logits, trained(ids).logits)
    model.save_pretrained(tmp_path / "both")
    again = CoupledForCausalLM.from_pretrained(tmp_path / "both")
    assert torch.equal(again(ids).logits, trained(ids).logits)


def _named_like_methods():
    """The names of specialists that torch and transformers have given to something of theirs."""
    names = {
        name for kind in (nn.ParameterDict, nn.ModuleDict, PreTrainedModel) for name in dir(kind)
    }
    for name in sorted(names):
        try:
            yield check_name(name.removeprefix("lm_"))
        except ConfigError:
            continue


def test_a_specialist_may_be_called_like_a_method_of_torch():
    names = [*_named_like_methods(), "head"]
    assert {"train", "update", "copy", "values", "forward"} <= set(names)
    logits = {name: torch.randn(2, 3, 5) for name in names}
    mixer, router = OutputMixer("learned", names), Router(names, 5)
    torch.testing.assert_close(mixer(logits), torch.stack(list(logits.values())).mean(0))
    assert router(logits).keys() == logits.keys()
    assert mixer.state_dict().keys() == {f"values.{name}" for name in names}
    mixer.load_state_dict({name: t + 1 for name, t in mixer.state_dict().items()})
    assert set(copy.deepcopy(mixer).weights(names).tolist()) == {mixer.weights(names)[0].item()}
    assert {name for name, _ in router.named_parameters()} == {
        f"rows.{name}.{part}" for name in names for part in ("weight", "bias")
    }


@pytest.mark.parametrize("name", ["train", "update", "copy", "head", "get", "values"])
@pytest.mark.parametrize("form", [FORMS["learned"], FORMS["moe"]], ids=["learned", "moe"])
def test_an_ensemble_with_a_specialist_called_like_a_method_is_as_any_other(form, name, tmp_path):
    settings = {key: value for key, value in form.items() if key != "width"}
    width, ids = form.get("width"), prompts()
    anchor, other = tiny("llama", width=width), tiny("gpt2", width=width)
    plain = rc_agents.couple(anchor, {"m": other}, alignment="shared", sites=2, **settings)
    model = rc_agents.couple(anchor, {name: other}, alignment="shared", sites=2, **settings)
    wake(model)
    wake(plain)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.save_pretrained(tmp_path, include_bases=True)
    assert torch.equal(CoupledForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    model.remove_specialist(name)
    model.add_specialist(name, other, alignment="shared")
    assert model.train().eval()(ids).logits.isfinite().all()


@pytest.mark.parametrize("topology", ["unilateral", "star_bilateral", "multi_bilateral"])
def test_a_preset_survives_a_specialist_with_edges_of_its_own(topology, tmp_path):
    model = ensemble("llama", "gpt2", topology=topology)
    edges, config = model.edges, copy.deepcopy(model.config.to_dict())
    model.add_specialist("law", tiny("qwen2"), alignment="shared", edges=[("medical", "law")])
    assert model.config.topology == [list(edge) for edge in (*edges, ("medical", "law"))]
    model.save_pretrained(tmp_path, include_bases=True)
    again = CoupledForCausalLM.from_pretrained(tmp_path)
    for each in (model, again):
        each.add_specialist("code", tiny("opt"), alignment="shared")
        assert each.edges == (*edges, Edge("medical", "law"), Edge("code", "anchor"))
        each.remove_specialist("code")
        assert not isinstance(each.config.topology, str)
        each.remove_specialist("law")
        assert (each.config.topology, each.config.preset) == (topology, None)
        assert each.edges == edges
    for field in ("names", "topology", "history", "site_layers", "alignment"):
        assert getattr(model.config, field) == config[field]
    whole = ensemble("llama", "gpt2", "qwen2", topology=topology)
    model.add_specialist("law", tiny("qwen2"), alignment="shared")
    assert model.edges == whole.edges


def test_edges_that_are_the_presets_leave_it_a_preset():
    model = ensemble("llama", "gpt2", topology="star_bilateral")
    own = [("anchor", "law"), ("law", "anchor")]
    model.add_specialist("law", tiny("qwen2"), alignment="shared", edges=own)
    assert model.config.topology == "star_bilateral"
