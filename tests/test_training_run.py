"""What a training run teaches, what it leaves alone, and when it stops; on tiny models."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

import rc_agents
from rc_agents.errors import TrainingError
from rc_agents.execution.exchange import EXCHANGE, Exchange
from rc_agents.training.activations import recomputed
from rc_agents.training.bridges import TrainConfig, train
from rc_agents.training.config import FUSED
from rc_agents.training.data import Document, Pair, encode, read
from rc_agents.training.items import DataSets, Items, batch_of, read_sets
from rc_agents.training.objectives import Step, objectives_of
from rc_agents.training.parameters import groups, training
from rc_agents.training.passes import WholePass, own_logits, targets
from rc_agents.training.probe import Probe
from tests.ensembles import own_state, unchanged_bases, wake
from tests.tiny import tiny
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training_runs import PAIRS, QUICK, TEXTS, bases, opened, small

pytestmark = pytest.mark.tiny


@pytest.fixture(autouse=True)
def _no_plots(request, monkeypatch):
    if "plots" not in request.node.name:
        monkeypatch.setattr("rc_agents.training.plots.draw", lambda metrics, folder: [])


def config(**changes):
    return TrainConfig(**{**QUICK, "steps": 3, **changes})


def sets_of(model, **changes):
    return read_sets(model.tokenizer, [*PAIRS, *TEXTS], TEXTS, None, config(**changes))


def batch(model, rows=(0, 3, 5)):
    """A batch of pairs of different lengths."""
    pairs = [*PAIRS[:4], {"prompt": "The river", "completion": " came down from the hills"}, *PAIRS]
    examples = encode(model.tokenizer, read(pairs), max_length=64, block_length=8)
    return batch_of(examples, rows, "data")


# The pass.


@pytest.mark.parametrize("mix", ["anchor", "average"])
def test_a_pass_gives_the_logits_of_labelled_tokens_alone(mix):
    model = small(mix=mix)
    wake(model)
    read = batch(model, (0, 4))
    whole = model(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).logits
    expected = whole[:, :-1][read["labels"][:, 1:] != -100]
    found = WholePass(model).logits(read)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.requires_grad
    frozen = WholePass(model).logits(read, coupled=False)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, own_logits(model, "anchor", read), rtol=1e-5, atol=1e-5)


def test_no_gradient_flows_into_what_does_not_need_it():
    """In a unilateral topology no graph is built below the first site, nor in any specialist."""
    model, seen = small(3), []
    wake(model)

    class Watching(Exchange):
        def __call__(self, site, states):
            seen.append({name: state.requires_grad for name, state in states.items()})
            return super().__call__(site, states)

    token = EXCHANGE.set(Watching)
    try:
        with training(model, only="b"):
            WholePass(model).logits(batch(model)).sum().backward()
            graded = {n for n, p in model.named_parameters() if p.grad is not None}
    finally:
        EXCHANGE.reset(token)
    assert seen == [
        {"anchor": False, "b": False, "c": False},
        {"anchor": True, "b": False, "c": False},
    ]
    assert graded
    assert all(name.startswith("bridges.b__anchor.") for name in graded)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("topology", ["unilateral", "multi_bilateral"])
@pytest.mark.parametrize("schedule", ["lockstep", "threads"])
def test_recomputed_activations_give_the_same_gradients(topology, schedule):
    model, calls = small(topology=topology, schedule=schedule), []
    wake(model)
    block = model.models["anchor"].model.layers[1]

    def gradients():
        model.zero_grad()
        logits = WholePass(model).logits(batch(model))
        cross_entropy(logits, targets(batch(model))).backward()
        return {n: p.grad.clone() for n, p in model.trainable_parameters() if p.grad is not None}

    expected = gradients()
    inner = block.input_layernorm.register_forward_hook(lambda *_: calls.append("inside"))
    outer = block.register_forward_hook(lambda *_: calls.append("block"))
    with recomputed(model):
        found = gradients()
    inner.remove()
    outer.remove()
    assert calls == ["inside", "block", "inside"]  # the insides again, the block's hooks not
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert "forward" not in vars(block)


# The terms of the loss.


def test_distillation_is_the_divergence_from_the_teacher():
    model = small(3)
    wake(model)
    read = batch(model)
    own = [own_logits(model, name, read).softmax(-1) for name in ("anchor", "b", "c")]
    student = WholePass(model).logits(read).log_softmax(-1)
    for teacher, wanted in ((FUSED, sum(own) / 3), ("c", own[2])):
        terms = objectives_of(config(distill_from=teacher), model, {"pairs"}, retains=False)
        found = {
            one.name: one(Step(WholePass(model), {"data": read}, "pairs")) for one in terms[::2]
        }
        expected = (wanted * (wanted.log() - student)).sum(-1).mean()
        assert found["distill"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_each_term_has_its_weight_and_its_own_value():
    model = small()
    wake(model)
    weights = {"answer_weight": 0.5, "retain_weight": 2.0, "distill_weight": 0.25}
    settings = config(
        **weights, text_weight=0.0, distill_from="b", distill_on="both", steps=4, log_steps=1
    )
    history = train(
        model, [*PAIRS, *TEXTS[:3]], config=settings, retain=TEXTS, progress=False
    ).history
    kinds = set()
    for entry in history:
        terms = {
            key.split("/")[1]: value for key, value in entry.items() if key.startswith("loss/")
        }
        kinds.add(tuple(terms))
        expected = sum(
            {"answer": 0.5, "retain": 2.0, "distill": 0.25}[name] * value
            for name, value in terms.items()
        )
        assert entry["loss"] == pytest.approx(expected, abs=1e-4)
    assert kinds == {("answer", "distill", "retain"), ("distill", "retain")}


def test_retention_counts_a_seeded_sample_of_positions():
    sets = sets_of(small())
    items = Items(sets, config(retain_positions=8), 6)
    counts = [int((item["retain"]["labels"] != -100).sum()) for item in items]
    assert counts == [8] * 6
    again = Items(sets, config(retain_positions=8), 6)
    drawn = [item["retain"]["labels"].ne(-100).any(0).tolist() for item in items]
    assert drawn == [item["retain"]["labels"].ne(-100).any(0).tolist() for item in again]
    assert len({tuple(row) for row in drawn}) > 1
    assert int((Items(sets, config(), 1)[0]["retain"]["labels"] != -100).sum()) == 2 * 15


# The optimizer.


def test_each_group_has_its_rate():
    model = small(mix="learned")
    chosen = dict(model.trainable_parameters())
    found = groups(chosen, config(mix_learning_rate=0.5, gate_learning_rate=0.25, weight_decay=0.1))
    assert [(one["kind"], one["lr"], one["weight_decay"]) for one in found] == [
        ("maps", 0.01, 0.1),
        ("gates", 0.25, 0.0),
        ("mix", 0.5, 0.0),
    ]
    assert sum(len(one["params"]) for one in found) == len(chosen)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("constant", [0, 0.5, 1, 1]), ("linear", [0, 0.5, 1, 0.5])],
)
def test_the_rate_follows_the_schedule(schedule, shares):
    settings = config(schedule=schedule, warmup=0.5, steps=4, log_steps=1, gradient_accumulation=2)
    found = train(small(), PAIRS, config=settings, progress=False)
    rates = [entry["learning_rate"] for entry in found.history]
    assert rates == pytest.approx([0.01 * share for share in shares])


def test_bfloat16_autocast_leaves_the_bridges_in_float32():
    losses = {}
    for bf16 in (False, True):
        model = small()
        wake(model)
        found = train(model, PAIRS, config=config(bf16=bf16, log_steps=1), progress=False)
        losses[bf16] = found.history[0]["loss"]
        assert {p.dtype for _, p in model.trainable_parameters()} == {torch.float32}
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
    assert losses[True] != losses[False]


# Validation.


class Watcher(TrainerCallback):
    """Keeps the bridges of every look at the validation set."""

    def __init__(self):
        self.seen = {}

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        self.seen[state.global_step] = (metrics["eval_loss"], own_state(model))


def test_training_stops_in_time_and_the_best_bridges_come_back():
    model, watcher = small(), Watcher()
    result = train(
        model,
        PAIRS[:3],
        config=config(steps=40, eval_steps=1, patience=2, learning_rate=0.1, schedule="constant"),
        validation=TEXTS,
        callbacks=[watcher],
        progress=False,
    )
    best = min(watcher.seen, key=lambda step: watcher.seen[step][0])
    assert result.best_step == best
    assert result.steps == best + 2 < 40
    assert [entry["step"] for entry in result.evaluations] == [*range(1, best + 3)]
    for name, tensor in own_state(model).items():
        assert torch.equal(tensor, watcher.seen[best][1][name])


def test_the_validation_loss_is_the_mean_over_all_its_tokens():
    model = small()
    wake(model)
    found = train(
        model, TEXTS, config=config(steps=1, eval_steps=1), validation=PAIRS, progress=False
    )
    examples = encode(model.tokenizer, read(PAIRS), max_length=64, block_length=8)
    read_all = batch_of(examples, range(len(examples)), "validation")
    loss = cross_entropy(WholePass(model).logits(read_all), targets(read_all))
    assert found.evaluations[0]["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_validation_and_training_share_no_prompt_and_no_document():
    model = small()
    sets = sets_of(model, validation_share=0.4)
    prompts = [
        {e.ids[: e.answer_start] for e in part if e.group != "text"}
        for part in (sets.data, sets.validation)
    ]
    assert all(prompts)
    assert not prompts[0] & prompts[1]
    doubled = [*PAIRS, {"prompt": "What  is 3?", "completion": " a third"}]
    again = read_sets(model.tokenizer, doubled, None, None, config(validation_share=0.4))
    first = tuple(model.tokenizer("What is 3?").input_ids)
    other = tuple(model.tokenizer("What  is 3?").input_ids)
    where = [
        [
            prompt in {e.ids[: e.answer_start] for e in part}
            for part in (again.data, again.validation)
        ]
        for prompt in (first, other)
    ]
    assert where[0] == where[1]


# What is left alone.


def test_one_specialist_trains_alone():
    model = small(3, mix="learned")
    wake(model)
    before = own_state(model)
    with unchanged_bases(model):
        train(model, PAIRS, config=config(), retain=TEXTS, only="c", progress=False)
    changed = {
        name for name, tensor in own_state(model).items() if not torch.equal(tensor, before[name])
    }
    assert changed
    assert all(name.startswith("bridges.c__anchor") or name == "mixer.values.c" for name in changed)
    assert all(parameter.requires_grad for _, parameter in model.trainable_parameters())
    assert len(dict(model.trainable_parameters())) == len(before)


def test_the_bases_train_only_where_that_is_asked_for(tmp_path):
    model = opened(bases(tmp_path / "bases"))
    before = model.base_fingerprint()
    train(model, PAIRS, config=config(steps=1), progress=False)
    assert model.base_fingerprint() == before
    settings = config(steps=2, base_learning_rate=1e-3, warmup=0)
    with pytest.warns(UserWarning, match="train_bases=True trains the base models"):
        train(model, PAIRS, tmp_path / "out", settings, train_bases=True, progress=False)
    after = model.base_fingerprint()
    assert after["anchor"] != before["anchor"]
    assert not any(p.requires_grad for p in model.models["anchor"].parameters())
    again = rc_agents.CoupledForCausalLM.from_pretrained(tmp_path / "out")
    assert again.base_fingerprint() == after


# The run's folder.


def test_plots_and_metrics_show_every_gate_and_contribution(tmp_path):
    model = opened(bases(tmp_path / "bases"))
    wake(model)
    settings = config(steps=4, log_steps=2, eval_steps=2)
    train(model, PAIRS, tmp_path / "out", settings, validation=TEXTS, progress=False)
    run = tmp_path / "out" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = {name for line in lines for name in line}
    assert {f"{kind}/b__anchor/{site}" for kind in ("gate", "norm") for site in (0, 1)} <= shown
    assert {"loss", "loss/answer", "eval_loss", "learning_rate", "grad_norm"} <= shown
    assert all(0 < line["gate/b__anchor/0"] < 1 for line in lines if "loss" in line)
    pngs = {path.name for path in run.glob("*.png")}
    assert pngs == {"loss.png", "gates.png", "contributions.png"}


def test_a_gate_is_the_mean_over_real_tokens():
    model, noted = small(), {}
    wake(model)
    for rows in ((0, 4), (0,), (4,)):
        read, found = batch(model, rows), {}
        with Probe(model).listening(read["attention_mask"], found.__setitem__):
            WholePass(model).logits(read)
        noted[rows] = found, int(read["attention_mask"].sum())
    for name, value in noted[0, 4][0].items():
        parts = [noted[row] for row in ((0,), (4,))]
        mean = sum(found[name] * count for found, count in parts) / sum(n for _, n in parts)
        assert value == pytest.approx(mean, abs=1e-4)


def test_the_bar_writes_nothing_to_stdout(capsys):
    train(small(), PAIRS, config=config(), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "loss" in captured.err


# Mistakes.


def _apart(**settings):
    """An ensemble whose specialist reads other tokens."""
    kinds = {"anchor": tiny_tokenizer("prose"), "b": tiny_tokenizer("metaspace")}
    anchor, other = (
        tiny("llama", vocab_size=len(one), layers=2, width=16) for one in kinds.values()
    )
    return rc_agents.couple(
        anchor, {"b": other}, topology="unilateral", sites=1, tokenizers=kinds, **settings
    )


def _train(model=None, data=PAIRS, output=None, *, settings=None, **more):
    train(model or small(), data, output, config(**(settings or {})), progress=False, **more)


def _broken():
    model = small()
    with torch.no_grad():
        model.bridge(("b", "anchor"), 0).map.weight.fill_(torch.inf)
    return model


MISTAKES = {
    "an unknown teacher": (
        lambda f: _train(settings={"distill_from": "d"}),
        r"distill_from='d': known: fused, b",
    ),
    "a teacher of another vocabulary": (
        lambda f: _train(_apart(), settings={"distill_from": "b"}),
        "distill_from='b': 'b' has another vocabulary than the anchor",
    ),
    "a fused teacher of two vocabularies": (
        lambda f: _train(_apart(), settings={"distill_from": FUSED}),
        "distill_from='fused': 'b' has another vocabulary",
    ),
    "data without a loss": (
        lambda f: _train(settings={"answer_weight": 0.0}),
        "the data holds pairs that no loss looks at; raise answer_weight",
    ),
    "an unknown specialist": (lambda f: _train(only="d"), "only='d': known: b$"),
    "patience without a judge": (
        lambda f: _train(settings={"patience": 2}),
        "patience needs validation data: pass validation, or set validation_share",
    ),
    "two judges": (
        lambda f: _train(validation=TEXTS, settings={"validation_share": 0.1}),
        "pass validation data or set validation_share, not both",
    ),
    "validation that was trained on": (
        lambda f: _train(validation=[{"prompt": "What  is 3?", "completion": "x"}]),
        "validation and training share 1 prompts or documents, as 'What  is 3",
    ),
    "a share that leaves nothing": (
        lambda f: _train(data=PAIRS[:1], settings={"validation_share": 0.01}),
        "leaves 1 records to train on and 0 to judge by",
    ),
    "checkpoints without an output": (
        lambda f: _train(settings={"save_steps": 1}),
        "checkpoints are kept beside the output: name an output",
    ),
    "a resume without an output": (lambda f: _train(resume=True), "name an output"),
    "loaded models and an output": (
        lambda f: _train(output=f / "out"),
        "model 'anchor' was passed in loaded and has no path or id",
    ),
    "bases with checkpoints": (
        lambda f: _train(output=f / "out", train_bases=True, settings={"save_steps": 1}),
        "train_bases changes what checkpoints and cached states take as given",
    ),
    "an unknown reporter": (
        lambda f: _train(settings={"report_to": ("nobody",)}),
        r"report_to=\['nobody'\]: nobody is not supported",
    ),
    "a reporter's name for a list": (
        lambda f: TrainConfig(report_to="tensorboard"),
        "report_to is a list of reporters, as in",
    ),
    "no steps": (lambda f: TrainConfig(steps=0), "steps must be positive, a whole number, not 0"),
    "half a step": (lambda f: TrainConfig(steps=1.5), "steps must be positive, a whole number"),
    "a negative weight": (
        lambda f: TrainConfig(retain_weight=-1),
        "retain_weight must be at least 0, not -1",
    ),
    "a rate that is not a number": (
        lambda f: TrainConfig(learning_rate=float("nan")),
        "learning_rate must be positive, not nan",
    ),
    "a share of all": (
        lambda f: TrainConfig(validation_share=1.0),
        "validation_share is a share below 1, not 1.0",
    ),
    "an unknown schedule": (
        lambda f: TrainConfig(schedule="cosin"),
        "schedule is one of cosine, linear, constant, not 'cosin'",
    ),
    "a loss that is no number": (
        lambda f: _train(_broken()),
        r"the loss is no longer a number at step 1 \(loss/answer\): lower learning_rate=0.01",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_answered_in_one_line(case, tmp_path):
    do, message = MISTAKES[case]
    with pytest.raises(TrainingError, match=message) as caught:
        do(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert not list(tmp_path.iterdir())


def test_kinds_are_read_off_the_data():
    model = small()
    assert sets_of(model).kinds() == {"pairs", "texts"}
    assert DataSets([], [], []).by_name() == {}
    assert read([Pair("a", "b"), Document("c")])
