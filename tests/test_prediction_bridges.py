"""Bridges that read what their source would say next, and edges with bridges of another form."""

from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from rc_agents.benchmarks.methods import hops
from rc_agents.benchmarks.settings import Recipe

import rc_agents
from rc_agents import BridgeConfig
from rc_agents.backbone import Lens
from rc_agents.errors import CheckpointError, ConfigError, TokenError, TrainingError
from rc_agents.training import data
from rc_agents.training.data import Document, Pair
from rc_agents.training.gate_start import Part, read_bridge
from rc_agents.training.prediction_start import set_prediction_start
from rc_agents.training.replay import ReplayPass
from rc_agents.training.solve import BLEND
from rc_agents.training.solve_chain import solve_chain
from rc_agents.training.warm_start import gather, set_start
from tests.ensembles import GREEDY, prompts
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer
from tests.virtual_device import virtual_devices

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


def read_chain(**changes):
    """The same with a tokenizer."""
    tokenizer = tiny_tokenizer("prose")
    return chain(len(tokenizer), tokenizers={"anchor": tokenizer}, **changes)


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


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_a_lens_follows_a_model_that_moves(arch):
    with virtual_devices(2) as devices:
        model = tiny(arch).to(devices[0])
        states = torch.randn(3, model.config.hidden_size)
        lens = Lens(model)
        expected = lens(states.to(devices[0])).cpu()
        model.to(devices[1])
        found = lens(states.to(devices[1]))
        assert found.device == devices[1]
        torch.testing.assert_close(found.cpu(), expected)


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


def test_nothing_is_predicted_where_the_gate_is_shut():
    shut = BridgeConfig(gate="token", gate_init=-4.0, gate_floor=0.05, update="blend")
    form = replace(shut, start="identity", reads="prediction", normalize_source=False)
    model, ids = chain(edge_bridges={("first", "second"): form}), prompts()
    bridge = model.bridge(("first", "second"), 0)
    asked, reading = [], bridge.reading
    bridge.reading = lambda states: asked.append(states.shape[:2].numel()) or reading(states)
    with torch.no_grad():
        bridge.gate.reads["source"].normal_(0, 2.0)
        found = model(ids).logits
    opened = asked.pop()
    assert 0 < opened < ids.numel()
    with torch.enable_grad():
        torch.testing.assert_close(model(ids).logits, found, rtol=1e-5, atol=1e-5)
    assert asked == [ids.numel()]


def test_threads_give_what_lockstep_gives():
    ids = prompts(rows=3, length=100)  # more states than the models have positions
    found = []
    for schedule in ("lockstep", "threads"):
        torch.manual_seed(0)
        found.append(chain(schedule=schedule)(ids).logits)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reads", ["state", "prediction"])
def test_stored_states_replay_bridges_of_any_form_and_sites_behind_one_block(reads, tmp_path):
    tokenizer = tiny_tokenizer("prose")
    form = BridgeConfig(gate="scalar", start="identity", update="blend", reads=reads)
    models = [tiny("llama", vocab_size=len(tokenizer), seed=seed, layers=4) for seed in (0, 1)]
    model = rc_agents.couple(
        models[0],
        {"other": models[1]},
        topology="unilateral",
        tokenizers=dict.fromkeys(("anchor", "other"), tokenizer),
        sites=[{"anchor": 2, "other": 1}, {"anchor": 2, "other": 4}, {"anchor": 4, "other": 4}],
        bridge=form,
    )
    records = [Pair("What is the name of the city?", " the hill"), Pair("in spring", " the water")]
    examples = data.encode(tokenizer, records, max_length=64, block_length=8)
    replay = ReplayPass(model, {"data": examples}, tmp_path, progress=False)
    batch = data.pad(examples) | {"rows": torch.tensor([0, 1]), "dataset": "data"}
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    keep = batch["labels"][:, 1:] != -100
    found = replay.logits(batch)
    torch.testing.assert_close(found, expected[:, :-1][keep], rtol=1e-4, atol=1e-4)


def test_a_specialist_comes_back_with_bridges_of_its_own_form_alone(tmp_path):
    model = chain()
    model.save_pretrained(tmp_path / "saved", include_bases=True)
    second = model.models["second"]
    model.remove_specialist("second")
    with pytest.raises(CheckpointError, match="its bridges have the form"):
        model.add_specialist(
            "second",
            second,
            alignment="shared",
            bridges=tmp_path / "saved",
            edges=[("first", "second"), ("second", "anchor")],
        )
    assert model.specialists == ["first"]


def test_a_specialist_is_added_where_the_anchor_stands_still():
    sites = [{"anchor": 4, "first": 2, "second": 4}, {"anchor": 4, "first": 4, "second": 4}]
    model = chain(sites=sites)
    model.add_specialist("third", tiny("llama", seed=3, layers=4), alignment="shared")
    assert [row[-1] for row in model.sites] == [4, 4]
    says = chain(edge_bridges={}, bridge=SAYS)
    with pytest.raises(TokenError, match="needs one vocabulary"):
        says.add_specialist("third", tiny("llama", seed=3, layers=4), alignment="clamp")


def test_forms_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="edge_bridges has keys such as"):
        chain(edge_bridges={"first->second": SAYS})
    with pytest.raises(ConfigError, match="edge_bridges is a mapping"):
        chain(edge_bridges=[SAYS])
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
    parts = get_args(Part)
    found = dict(zip(parts, read_bridge(model, edge, 1, examples, *parts), strict=True))
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
    with model.disabled("second"), pytest.raises(TrainingError, match="does not run"):
        read_bridge(model, edge, 1, examples, "answer")


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
    louder = read_chain(edge_bridges={("first", "second"): replace(SAYS, normalize_source=True)})
    with pytest.raises(TrainingError, match="is to go on from what it hears"):
        set_prediction_start(louder, ("first", "second"), 0, texts)
    with pytest.raises(TrainingError, match="does not read predictions"):
        set_prediction_start(model, ("second", "anchor"), 1, texts)
    with pytest.raises(TrainingError, match="use set_prediction_start"):
        set_start(model, gather(model, texts, progress=False))
    with pytest.raises(TrainingError, match="got no text"):
        set_prediction_start(model, ("first", "second"), 0, [{"prompt": "a", "completion": "b"}])


def test_a_chain_is_solved_in_the_order_in_which_it_speaks(monkeypatch):
    form = {("first", "second"): replace(BLEND, reads="prediction")}
    model = read_chain(bridge=BLEND, edge_bridges=form)
    lines = PROSE.splitlines()
    monkeypatch.setattr(hops, "documents", lambda part, count: lines[:count])
    bench = SimpleNamespace(
        recipe=Recipe(gates=1e-3, quiet=0.99, start_documents=20),
        pairs=lambda: [Pair(f"What is {n}?", f" the number {n}", "ask") for n in range(12)],
        retained=lambda: [
            *map(Document, lines * 6),
            Pair("Who is nobody?", " a stranger", "strangers"),
        ],
    )
    fitted = hops.solved_hops(bench, model)
    gates = fitted.notes["gates"]
    assert list(gates) == ["first__second.0", "second__anchor.1"]
    assert gates["first__second.0"]["positives"] == 12  # one place in each chain
    assert gates["second__anchor.1"]["positives"] > 12
    for edge, site in ((("first", "second"), 0), (("second", "anchor"), 1)):
        assert model.bridge(edge, site).gate.reads["source"].any()
    idle = [(("first", "second"), 1), (("second", "anchor"), 0)]
    assert not any(model.bridge(edge, site).gate.reads["source"].any() for edge, site in idle)
    before = (hand := model.bridge(("first", "second"), 0).gate).value.item()
    with torch.no_grad():
        hand.value.fill_(-50.0)
    again = hops.solved_hops(bench, model)
    assert hand.value.item() == pytest.approx(before, abs=1e-4)
    assert again.notes["gates"] == gates


def test_what_is_no_chain_cannot_be_solved_as_one():
    shut = BridgeConfig(gate="token", update="blend", normalize_source=False, start="identity")
    says = {("first", "second"): replace(shut, reads="prediction")}
    pairs = [Pair("What is 1?", " the number 1", "ask")]
    texts = PROSE.splitlines()
    side = [("first", "anchor"), ("second", "anchor")]
    for settings, message in (
        ({"bridge": replace(HEARD, gate="token", gate_floor=0.05), "edge_bridges": {}},
         "all bridges but those into the anchor read"),
        ({"edge_bridges": says}, "sets token gates"),
        ({"topology": side, "edge_bridges": {}}, "one path into the anchor; the edges are first->"),
        ({"sites": [{"anchor": 4, "first": 4, "second": 1}], "bridge": shut, "edge_bridges": says},
         "a site for each edge of the chain: 2 edges .*, 1 sites"),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=message):
            solve_chain(read_chain(**settings), pairs, texts)
