"""Warm start and training of bridges, on tiny models."""

import pytest
import torch

import rc_agents
from rc_agents.errors import DataError, TrainingError
from rc_agents.training.bridges import TrainConfig, retention, train
from rc_agents.training.warm_start import warm_start
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

pytestmark = pytest.mark.tiny
TEXTS = PROSE.splitlines()
PAIRS = [{"prompt": f"What is {n}?", "completion": f" the number {n}"} for n in range(12)]
QUICK = {"batch_size": 4, "text_batch_size": 2, "block_length": 16, "retain_batch_size": 2}


def ensemble(**settings):
    tokenizer = tiny_tokenizer("prose")
    models = [tiny(kind, vocab_size=len(tokenizer)) for kind in ("llama", "qwen2", "gpt2")]
    defaults = {
        "topology": "unilateral",
        "sites": 2,
        "bridge": rc_agents.BridgeConfig(gate="token"),
    }
    tokenizers = dict.fromkeys(("anchor", "b", "c"), tokenizer)
    return rc_agents.couple(
        models[0],
        {"b": models[1], "c": models[2]},
        tokenizers=tokenizers,
        **{**defaults, **settings},
    )


def test_a_warm_start_between_twins_finds_the_identity():
    tokenizer = tiny_tokenizer("prose")
    model = tiny("llama", vocab_size=len(tokenizer))
    twins = rc_agents.couple(
        model,
        {"twin": model},
        topology="unilateral",
        sites=1,
        tokenizers=dict.fromkeys(("anchor", "twin"), tokenizer),
    )
    fit = warm_start(twins, TEXTS * 4, ridge=1e-9, progress=False)
    weight = twins.bridge(("twin", "anchor"), 0).map.weight
    assert fit == {"twin__anchor.0": pytest.approx(1, abs=1e-3)}
    torch.testing.assert_close(weight, torch.eye(len(weight)), atol=1e-2, rtol=0)


def test_a_warm_start_solves_the_ridge_problem_for_models_of_different_width_and_tokenizer():
    tokenizers = {"anchor": tiny_tokenizer("prose"), "b": tiny_tokenizer("metaspace")}
    anchor = tiny("llama", vocab_size=len(tokenizers["anchor"]))
    other = tiny("gpt2", vocab_size=len(tokenizers["b"]))
    model = rc_agents.couple(
        anchor, {"b": other}, topology="unilateral", sites=2, tokenizers=tokenizers
    )
    fit = warm_start(model, TEXTS, progress=False)
    assert set(fit) == {"b__anchor.0", "b__anchor.1"}
    assert all(0 < share < 1 for share in fit.values())


def test_a_warm_start_sets_only_the_edges_it_is_asked_for():
    model = ensemble()
    warm_start(model, TEXTS, edges=[("b", "anchor")], progress=False)
    assert model.bridge(("b", "anchor"), 0).map.weight.any()
    assert not model.bridge(("c", "anchor"), 0).map.weight.any()


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([" "], {}, "no text"),
        (TEXTS, {"bridge": rc_agents.BridgeConfig(kind="random")}, "linear and low-rank bridges"),
    ],
)
def test_a_warm_start_refuses_what_it_cannot_do(texts, settings, message):
    with pytest.raises(TrainingError, match=message):
        warm_start(ensemble(**settings), texts, progress=False)


def test_training_lowers_the_loss_and_leaves_the_bases_alone():
    model = ensemble()
    before = model.base_fingerprint()
    result = train(
        model,
        PAIRS,
        config=TrainConfig(steps=40, learning_rate=1e-2, **QUICK),
        retain=TEXTS,
        progress=False,
    )
    losses = [entry["loss"] for entry in result.history]
    assert result.steps == 40
    assert losses[-1] < losses[0]
    assert model.base_fingerprint() == before
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.models["anchor"].parameters())


def test_gates_move_at_their_own_rate():
    moved = {}
    for rate in (1e-6, 1e-1):
        model = ensemble()
        gate = model.bridge(("b", "anchor"), 0).gate.value
        warm_start(model, TEXTS, progress=False)
        train(
            model,
            PAIRS,
            config=TrainConfig(steps=5, gate_learning_rate=rate, **QUICK),
            progress=False,
        )
        moved[rate] = abs(gate.item() + 2)
    assert moved[1e-6] < 1e-4 < 1e-2 < moved[1e-1]


def test_retention_is_zero_untrained_and_grows_with_the_bridges():
    model = ensemble()
    ids = torch.tensor(model.tokenizer(TEXTS[0]).input_ids)[None, :16]
    mask = torch.ones_like(ids)
    assert retention(model, ids, mask).item() == pytest.approx(0, abs=1e-6)
    for parameter in model.bridges.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert retention(model, ids, mask).item() > 1e-3


def test_a_trained_ensemble_is_saved_with_its_log(tmp_path):
    model = ensemble()
    for name in model.names:
        model.models[name].save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    on_disk = rc_agents.couple(
        str(tmp_path / "anchor"), {"b": str(tmp_path / "b")}, topology="unilateral", sites=2
    )
    train(on_disk, PAIRS, tmp_path / "out", TrainConfig(steps=3, **QUICK), progress=False)
    again = rc_agents.CoupledForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, on_disk(ids).logits)
    assert len((tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()) > 1


def test_nothing_to_train_and_no_data_are_named():
    alone = rc_agents.couple(
        tiny("llama", vocab_size=400), tokenizers={"anchor": tiny_tokenizer("prose")}
    )
    with pytest.raises(TrainingError, match="nothing to train"):
        train(alone, PAIRS, progress=False)
    with pytest.raises(DataError):
        train(ensemble(), [], progress=False)
    with pytest.raises(TrainingError, match="steps must be positive"):
        TrainConfig(steps=0)


@pytest.mark.parametrize("kind", ["prose", "metaspace"])
def test_a_warm_start_sets_edges_whose_target_nobody_hears(kind):
    tokenizers = {"anchor": tiny_tokenizer("prose"), "b": tiny_tokenizer(kind)}
    anchor, other = (tiny("llama", vocab_size=len(one)) for one in tokenizers.values())
    model = rc_agents.couple(
        anchor, {"b": other}, topology=[("anchor", "b")], sites=2, tokenizers=tokenizers
    )
    fit = warm_start(model, TEXTS, progress=False)
    assert set(fit) == {"anchor__b.0", "anchor__b.1"}
    assert model.bridge(("anchor", "b"), 0).map.weight.any()


def test_a_warm_start_of_routers_is_refused():
    twins = [tiny("llama", seed=seed, vocab_size=len(tiny_tokenizer("prose"))) for seed in (0, 1)]
    model = rc_agents.couple(
        twins[0],
        {"b": twins[1]},
        bridge="moe",
        sites=2,
        tokenizers=dict.fromkeys(("anchor", "b"), tiny_tokenizer("prose")),
    )
    with pytest.raises(TrainingError, match="this ensemble has none"):
        warm_start(model, TEXTS, progress=False)
