"""Encoders of pictures and sound as nodes of a graph: shown their own inputs, heard through the latent space."""

import copy
from dataclasses import replace

import pytest
import torch

from rc_agents import graph as graphs
from rc_agents import questions
from rc_agents.errors import ConfigError, DataError, RCError
from rc_agents.graph.reading import Shown
from tests.eyes import CONFIGS, tiny_encoder
from tests.eyes import shown as looks
from tests.graphs import TEXTS
from tests.tiny import tiny
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny

ASKED = [questions.Question("What is it?", ("a house", "a river"), place % 2) for place in range(6)]


def seeing(kind="vit", **changed):
    """A graph whose judge hears an encoder and a node that reads."""
    nodes = {
        "eye": {"pooling": "mean"} | changed.pop("eye", {}),
        "reader": {"layer": 3},
        "judge": {"hears": ["eye", "reader"], "at": 2},
    }
    config = {"nodes": nodes, "latent": {"width": 16}, "output": {"width": 16, **changed}}
    tokenizer = tiny_tokenizer("prose")
    models = {
        "eye": tiny_encoder(kind),
        "reader": tiny("llama", vocab_size=len(tokenizer)),
        "judge": tiny("qwen2", vocab_size=len(tokenizer)),
    }
    return graphs.build(config, models, tokenizers={"reader": tokenizer, "judge": tokenizer})


def shown(kind="vit", rows=6, seed=0):
    """So many inputs of one row each."""
    whole = looks(kind, rows, seed)
    return [{name: value[row : row + 1] for name, value in whole.items()} for row in range(rows)]


def told(kind="vit", rows=4, seed=0):
    """What every node reads."""
    return {"eye": shown(kind, rows, seed), "reader": TEXTS[:rows], "judge": TEXTS[:rows]}


def scores(graph, read):
    with torch.no_grad():
        return graph(graph.read_texts(read)).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_an_encoder_is_shown_reaches_the_output(kind):
    graph = seeing(kind)
    first, other = scores(graph, told(kind)), scores(graph, told(kind, seed=1))
    assert not torch.allclose(first, other, atol=1e-5)
    silent = graph(graph.read_texts(told(kind)), without=["eye"]).logits
    also = graph(graph.read_texts(told(kind, seed=1)), without=["eye"]).logits
    assert torch.equal(silent, also)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_node_shows_the_pooled_states_of_its_encoder(pooling):
    graph = seeing(eye={"pooling": pooling, "layer": 1})
    read = graph.read_texts(told())
    states = graph.members["eye"].model(**read["eye"], output_hidden_states=True).hidden_states[1]
    found = graph(read).signals.shown["eye"]
    assert torch.allclose(found, states.mean(1), atol=1e-5)  # attention starts as the mean


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_row_is_the_same_alone_and_in_a_batch(kind):
    graph = seeing(kind)
    whole = scores(graph, told(kind))
    for row in range(len(TEXTS)):
        alone = {name: each[row : row + 1] for name, each in told(kind).items()}
        assert torch.allclose(scores(graph, alone)[0], whole[row], atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_kept_states_give_the_scores_of_the_whole_graph(kind, tmp_path):
    graph = seeing(kind)
    kept = graphs.Kept(graph, tmp_path, progress=False)
    kept.complete(told(kind))
    run = graphs.Replay(graph, kept).of(told(kind))
    whole = graph(graph.read_texts(told(kind))).logits
    assert torch.allclose(graph(run=run).logits, whole, atol=1e-4)
    again = graphs.Kept(graph, tmp_path, progress=False)
    again._compute = None  # nothing is missing
    again.complete(told(kind))


@pytest.mark.parametrize("layout", ["lettered", "answered"])
def test_it_trains_and_keeps_the_encoder_as_it_was(layout, tmp_path):
    graph = seeing(choices=2, layout=layout)
    before = copy.deepcopy(graph.members["eye"].model.state_dict())
    asked = graphs.ask(graph.config, ASKED, shown={"eye": shown()})
    config = graphs.GraphTrainConfig(steps=60, batch_size=6, learning_rate=3e-2, warmup=0.1)
    result = graphs.train(graph, asked, config=config, keep=tmp_path, progress=False)
    assert result.loss < 0.3  # the text says nothing: what is right is in the picture alone
    assert [one.place for one in graphs.choose(graph, asked)] == [one.label for one in ASKED]
    for name, weight in graph.members["eye"].model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_ridge_start_reads_pictures():
    graph = seeing()
    found = graphs.ridge_start(graph, graphs.ask(graph.config, ASKED, shown={"eye": shown()}))
    assert set(found.encode) == {"eye", "reader"}


def test_a_graph_that_speaks_sees():
    graph = seeing(readout="vocabulary")
    graph.hear["judge"].map.weight.data.normal_()
    one, other = (
        graph.generate(told(seed=seed), max_new_tokens=8, do_sample=False) for seed in (0, 1)
    )
    assert one != other


def test_saved_equals_loaded(tmp_path):
    made = seeing()
    for name, member in made.members.items():
        member.model.save_pretrained(tmp_path / name)
        if member.tokenizer is not None:
            member.tokenizer.save_pretrained(tmp_path / name)
    config = made.config.to_dict()
    for name, node in config["nodes"].items():
        node["model"] = str(tmp_path / name)
    graph = graphs.build(config)
    graph.save_pretrained(tmp_path / "graph")
    again = graphs.LatentGraph.from_pretrained(tmp_path / "graph")
    assert again.encoders == ["eye"]
    assert torch.equal(scores(again, told()), scores(graph, told()))


def test_what_is_shown_is_known_by_its_content():
    one, same, other = shown()[0], copy.deepcopy(shown()[0]), shown()[1]
    assert Shown(one) == Shown(same)
    assert hash(Shown(one)) == hash(Shown(same))
    assert Shown(one) != Shown(other)
    narrow = {name: value.half() for name, value in one.items()}
    assert Shown(one) != Shown(narrow)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (TEXTS, "node 'eye' is an encoder and reads no text"),
        ({**told(), "eye": TEXTS}, "entry 0 of node 'eye', an encoder, is 'What is the name"),
        ({**told(), "eye": shown(rows=2)}, "as many texts as the others, got eye 2, reader 4"),
        ({**told(), "eye": [{"pixels": torch.ones(1, 2)}] * 4}, "node 'eye' needs 'pixel_values'"),
        ({**told(), "eye": [looks("vit", 2, 0)] * 4}, "give one row each, all of one size"),
        ({**told(), "eye": [{"pixel_values": [[0.5]]}] * 4}, "with return_tensors='pt'"),
        ({**told(), "reader": shown(rows=4)}, "text 0 of node 'reader' is .*expected text"),
    ],
)
def test_what_cannot_be_seen_is_said(read, message):
    graph = seeing()
    with pytest.raises(RCError, match=message):
        graph(graph.read_texts(read))


def test_what_an_encoder_cannot_be_is_said():
    with pytest.raises(ConfigError, match="is an encoder, which hears nobody"):
        seeing(eye={"hears": ["reader"]})
    with pytest.raises(ConfigError, match="last position stands for no other; set pooling to mean"):
        seeing(eye={"pooling": "last"})
    with pytest.raises(ConfigError, match="'eye' is an encoder, which has no words"):
        seeing(readout="vocabulary", reads=["eye", "judge"], voice="eye")


def test_as_many_are_shown_as_are_asked():
    config = seeing().config
    with pytest.raises(DataError, match="node 'eye' is shown 2 inputs for 6 questions"):
        graphs.ask(config, ASKED, shown={"eye": shown(rows=2)})
    with pytest.raises(ConfigError, match=r"unknown node 'eyes'.*did you mean 'eye'"):
        graphs.ask(config, ASKED, shown={"eyes": shown()})


def test_pictures_that_validate_are_not_trained_on():
    graph = seeing(choices=2)
    asked = graphs.ask(graph.config, ASKED, shown={"eye": shown()})
    with pytest.raises(RCError, match="validation and training share 1 examples"):
        graphs.train(graph, asked, validation=[replace(asked[0])], progress=False)
