"""Stored states: a replayed step gives what the whole ensemble gives; files survive kills and damage."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import rc_agents
from rc_agents.errors import TrainingError
from rc_agents.training.data import Encoded
from rc_agents.training.labelled import predicting
from rc_agents.training.replay import ReplayPass
from rc_agents.training.states import StateStore
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

pytestmark = pytest.mark.tiny
TEXTS = PROSE.splitlines()[:6]


def ensemble(anchor="llama", others=("qwen2", "gpt2"), span=False, **settings):
    tokenizer = tiny_tokenizer("prose")
    other = tiny_tokenizer("metaspace") if span else tokenizer
    models = [tiny(kind, vocab_size=len(other)) for kind in others]
    return rc_agents.couple(
        tiny(anchor, vocab_size=len(tokenizer)),
        {f"s{number}": one for number, one in enumerate(models)},
        tokenizers={"anchor": tokenizer} | {f"s{n}": other for n in range(len(models))},
        **{
            "topology": "unilateral",
            "sites": 2,
            "bridge": rc_agents.BridgeConfig(gate="token", start="default"),
            **settings,
        },
    )


def examples(model):
    rows = [tuple(model.tokenizer(text).input_ids[:12]) for text in TEXTS]
    return [Encoded(ids, len(ids) // 2, "") for ids in rows]


def batch_of(data, rows):
    width = max(len(data[row].ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        size = len(data[row].ids)
        ids[place, :size] = torch.tensor(data[row].ids)
        mask[place, :size] = 1
        labels[place, data[row].answer_start : size] = ids[place, data[row].answer_start : size]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "rows": torch.tensor(rows),
        "dataset": "data",
    }


def whole(model, batch):
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits[predicting(batch["labels"])]


def loss(logits, batch):
    return cross_entropy(logits, batch["labels"][batch["labels"] != -100])


@pytest.mark.parametrize(
    ("anchor", "settings"),
    [
        ("llama", {}),
        ("llama", {"sites": 1}),
        ("gpt2", {}),
        ("gemma3_text", {}),
        ("mamba2", {}),
        ("gpt_neox", {}),
        ("llama", {"span": True}),
    ],
)
def test_a_replayed_step_gives_the_logits_and_gradients_of_the_whole_ensemble(
    anchor, settings, tmp_path
):
    model = ensemble(anchor, **settings)
    data = examples(model)
    replay = ReplayPass(model, {"data": data}, tmp_path, progress=False)
    batch = batch_of(data, [4, 1, 3])
    found, expected = replay.logits(batch), whole(model, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    loss(found, batch).backward()
    replayed = {name: p.grad.clone() for name, p in model.trainable_parameters()}
    model.zero_grad()
    loss(expected, batch).backward()
    for name, parameter in model.trainable_parameters():
        torch.testing.assert_close(replayed[name], parameter.grad, atol=1e-5, rtol=1e-3)
    with torch.no_grad(), model.disabled():
        frozen = whole(model, batch)
    torch.testing.assert_close(replay.logits(batch, coupled=False), frozen, atol=1e-5, rtol=1e-4)


def store_of(model, data, folder):
    store = StateStore(model, folder, progress=False)
    store.complete(data)
    return store


def many(model):
    ids = [tuple(model.tokenizer(text).input_ids) for text in TEXTS]
    return [Encoded((*row[:8], extra), 1, "") for row in ids for extra in range(30)]


def test_states_are_computed_once_and_again_where_a_file_is_damaged_or_missing(
    tmp_path, monkeypatch
):
    model = ensemble()
    data = many(model)  # several chunks
    first = store_of(model, data, tmp_path)
    chosen = [data[place] for place in (0, 100, 170)]
    expected = first.rows(chosen)
    files = sorted(first.folder.glob("chunk-*"))
    assert len(files) == 3
    calls = []
    run = StateStore._run
    monkeypatch.setattr(StateStore, "_run", lambda *a: calls.append(1) or run(*a))
    store_of(model, data[50:], tmp_path)  # another data set of the same texts
    assert not calls
    files[0].write_bytes(files[0].read_bytes()[:-7])
    files[2].unlink()
    (first.folder / ".making-killed").write_bytes(b"half a file")
    with pytest.warns(UserWarning, match="damaged"):
        again = store_of(model, data, tmp_path)
    assert calls
    for name, states in again.rows(chosen).items():
        torch.testing.assert_close(states, expected[name], atol=1e-5, rtol=1e-4)


def test_other_weights_take_another_folder(tmp_path):
    one, other = ensemble(), ensemble(others=("qwen2",))
    folders = {StateStore(model, tmp_path, progress=False).folder for model in (one, other)}
    assert len(folders) == 2


def test_states_are_refused_where_specialists_hear_others(tmp_path):
    model = ensemble(topology="multi_bilateral")
    with pytest.raises(TrainingError, match="unilateral"):
        ReplayPass(model, {"data": examples(model)}, tmp_path, progress=False)


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    model = ensemble()
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="states cannot be kept"):
        StateStore(model, tmp_path / "file", progress=False)


def test_states_are_refused_where_the_output_is_mixed(tmp_path):
    model = ensemble(mix="average")
    with pytest.raises(TrainingError, match="mixes outputs"):
        ReplayPass(model, {"data": examples(model)}, tmp_path, progress=False)


def test_the_key_is_the_same_for_equal_ensembles_and_another_where_a_config_differs(tmp_path):
    folder = StateStore(ensemble(), tmp_path, progress=False).folder
    model = ensemble()
    model.models["s0"].config.rms_norm_eps = 0.5  # states depend on more than weights
    assert StateStore(ensemble(), tmp_path, progress=False).folder == folder
    assert StateStore(model, tmp_path, progress=False).folder != folder


def test_states_are_refused_while_a_specialist_is_disabled(tmp_path):
    model = ensemble()
    with model.disabled("s0"), pytest.raises(TrainingError, match="s0 is disabled"):
        StateStore(model, tmp_path, progress=False)
