"""Bridges that read what their source would say next, and edges with bridges of another form."""

from typing import get_args

import pytest
import torch

import rc_agents
from rc_agents import BridgeConfig
from rc_agents.backbone import Lens
from rc_agents.errors import ConfigError, TokenError, TrainingError
from rc_agents.training import data
from rc_agents.training.data import Pair
from rc_agents.training.gate_start import Part, read_bridge
from rc_agents.training.prediction_start import set_prediction_start
from rc_agents.training.warm_start import gather, set_start
from tests.ensembles import GREEDY, prompts
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

SAYS = BridgeConfig(
    gate="fixed", start="identity", update="blend", reads="prediction", normalize_source=False
)
HEARD = BridgeConfig(gate="fixed", start="default", normalize_source=False)


def chain(vocabulary=96, **changes):
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
    form = {"layers": 4, "vocab_size": vocabulary}
    others = {"first": tiny("gpt2", seed=1, **form), "second": tiny("llama", seed=2, **form)}
    return rc_agents.couple(tiny("llama", **form), others, **settings | changes)


def read_chain():
    """The same with a tokenizer."""
    tokenizer = tiny_tokenizer("prose")
    return chain(len(tokenizer), tokenizers={"anchor": tokenizer})


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


# Solving for them.


def test_what_a_bridge_reads_is_what_it_is_given_in_the_running_ensemble():
    model = read_chain()
    pairs = [Pair("the people of the town", " river"), Pair("in spring", " the water and the road")]
    examples = data.encode(model.tokenizer, pairs, max_length=64, block_length=8)
    edge = ("second", "anchor")
    found = {part: read_bridge(model, edge, 1, examples, part) for part in get_args(Part)}
    counts = {part: len(states["source"]) for part, states in found.items()}
    lengths = [(one.answer_start, len(one.ids)) for one in examples]
    assert counts == {
        "answer": sum(end - start for start, end in lengths),
        "first": 2,
        "rest": sum(end - start - 1 for start, end in lengths),
        "prompt": sum(start - 2 for start, _ in lengths),
        "all": sum(end - 2 for _, end in lengths),
    }
    one = min(examples, key=lambda example: len(example.ids))
    seen = []
    model.bridge(edge, 1).register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(torch.tensor([one.ids]))
    for place, end in enumerate(("source", "target")):
        expected = seen[0][place][0, one.answer_start - 1]
        torch.testing.assert_close(found["first"][end][0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TrainingError, match="no token that predicts: first"):
        read_bridge(model, edge, 1, [], "first")


def test_the_map_of_a_prediction_is_the_least_squares_one():
    model = read_chain()
    texts = PROSE.splitlines()[:40]
    explained = set_prediction_start(model, ("first", "second"), 0, texts, ridge=1e-6)
    second, x, y = model.models["second"], [], []
    for text in texts:
        ids = torch.tensor([model.tokenizer(text).input_ids[:256]])
        with torch.no_grad():
            states = second(ids, output_hidden_states=True).hidden_states[1]
        x.append(second.get_input_embeddings().weight[ids[0, 1:]].detach().double())
        y.append(states[0, 1:].double())
    x, y = torch.cat(x), torch.cat(y)
    expected = torch.linalg.lstsq(x, y, driver="gelsd").solution
    assert len(x) > x.shape[1]
    fitted = x @ model.bridge(("first", "second"), 0).map.weight.T.detach().double()
    torch.testing.assert_close(fitted, x @ expected, rtol=1e-2, atol=1e-2)
    residual = (y - fitted).square().sum() / (y - y.mean(0)).square().sum()
    assert explained == pytest.approx(1 - float(residual), abs=1e-4)
    with pytest.raises(TrainingError, match="does not read predictions"):
        set_prediction_start(model, ("second", "anchor"), 1, texts)
    with pytest.raises(TrainingError, match="use set_prediction_start"):
        set_start(model, gather(model, texts, progress=False))
    with pytest.raises(TrainingError, match="got no text"):
        set_prediction_start(model, ("first", "second"), 0, [{"prompt": "a", "completion": "b"}])
