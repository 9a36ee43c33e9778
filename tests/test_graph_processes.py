"""A graph whose nodes run elsewhere: the same answers and gradients as in one place, and survival of the rest."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rc_agents import graph as graphs
from rc_agents.cli.app import run
from rc_agents.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    ModelRunError,
    RCError,
    TrainingError,
)
from rc_agents.execution.wire import LinkError
from rc_agents.nodes import NodeSettings
from tests.eyes import shown as looks
from tests.eyes import tiny_encoder
from tests.graphs import ARCHS, KINDS, TEXTS, plain
from tests.tiny import saved
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny

QUICK = NodeSettings(deadline=3.0, join=3.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The plain graph, its models in folders."""
    folder = tmp_path_factory.mktemp("models")
    nodes = {
        name: {**node, "model": str(saved(folder, ARCHS[name], KINDS[name]))}
        for name, node in plain()["nodes"].items()
    }
    return {**plain(), "nodes": nodes}


@contextlib.contextmanager
def served(config, *names, settings=QUICK, **options):
    """Runs nodes in threads of this process, over real links; yields their addresses."""
    servers = {
        name: graphs.NodeServer(config, name, settings=settings, **options) for name in names
    }
    threads = [threading.Thread(target=one.serve) for one in servers.values()]
    for thread in threads:
        thread.start()
    try:
        yield {name: f"{one.address[0]}:{one.address[1]}" for name, one in servers.items()}
    finally:
        for one in servers.values():
            one.close()
        for thread in threads:
            thread.join()


def changed(config, name, **values):
    """The config with one node changed."""
    nodes = {**config["nodes"], name: {**config["nodes"][name], **values}}
    return {**config, "nodes": nodes}


def passed(graph):
    """Scores of the texts, and the gradients of their loss."""
    graph.zero_grad()
    output = graph(graph.read_texts(TEXTS), labels=torch.tensor([0, 1, 2, 3]))
    output.loss.backward()
    grads = {name: one.grad.clone() for name, one in graph.trainable_parameters()}
    return output.logits.detach(), grads


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"position": "all", "pooling": "mean"},
        {"pooling": "attention", "learn_strength": True, "strength": 0.5},
    ],
    ids=["last", "all", "learned"],
)
@pytest.mark.parametrize("away", [["a", "b"], ["c"], ["a", "b", "c", "d"]], ids="".join)
def test_scores_and_gradients_are_those_of_one_process(config, node, away):
    config = changed(config, "c", **node)
    here = graphs.build(config, seed=3)
    with served(config, *away) as processes:
        there = graphs.build(config, seed=3, processes=processes, settings=QUICK)
        assert sorted(there.members) == sorted(
            set("abcd") - set(away)
        )  # no weight of theirs is here
        (scores, grads), (expected, wanted) = passed(there), passed(here)
    assert torch.allclose(scores, expected, atol=1e-5)
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.allclose(grads[name], grad, atol=1e-5), name


def test_nodes_of_a_level_run_at_once(config):
    met = threading.Barrier(2, timeout=20)
    with served(config, "a", "b") as processes:
        graph = graphs.build(config, processes=processes, settings=QUICK)
        for name in "ab":
            node = graph.nodes[name]
            asked = node._asked
            node._asked = lambda *args, asked=asked: (met.wait(), asked(*args))[1]
        output = graph(graph.read_texts(TEXTS))  # breaks the barrier were they asked one by one
        assert output.signals.lost == {}
        assert not met.broken


def test_an_encoder_runs_elsewhere(config, tmp_path):
    eye = tiny_encoder("vit")
    eye.save_pretrained(tmp_path / "eye")
    nodes = {
        "eye": {"model": str(tmp_path / "eye"), "pooling": "mean"},
        "c": {**config["nodes"]["c"], "hears": ["eye"]},
    }
    config = {"nodes": nodes, "latent": {"width": 8}, "output": {"width": 8}}
    pictures = [{"pixel_values": one[None]} for one in looks("vit", len(TEXTS))["pixel_values"]]
    read = {"eye": pictures, "c": TEXTS}
    here = graphs.build(config)
    with served(config, "eye") as processes:
        there = graphs.build(config, processes=processes, settings=QUICK)
        assert there.encoders == ["eye"]
        found = there(there.read_texts(read)).logits
    assert torch.allclose(found, here(here.read_texts(read)).logits, atol=1e-5)


def test_it_trains_and_is_saved_from_here(config, tmp_path):
    asked = [graphs.Question(text, ("yes", "no"), place % 2) for place, text in enumerate(TEXTS)]
    settings = graphs.GraphTrainConfig(steps=20, batch_size=4, learning_rate=1e-2)
    with served(config, "a", "c") as processes:
        graph = graphs.build(config, processes=processes, settings=QUICK)
        result = graphs.train(graph, asked, tmp_path / "graph", settings, progress=False)
        assert result.loss < result.history[0]["loss"]
        choices = graph.choose(asked)
        with pytest.raises(TrainingError, match="leave out keep, as 'a' runs in another"):
            graphs.train(graph, asked, keep=tmp_path / "kept", progress=False)
        with pytest.raises(TrainingError, match="load 'c' in this process"):
            graphs.ridge_start(graph, graphs.ask(graph.config, asked))
    again = graphs.LatentGraph.from_pretrained(tmp_path / "graph")  # all in one process
    for one, other in zip(choices, again.choose(asked), strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    other = changed(config, "a", model=config["nodes"]["b"]["model"])
    with (
        served(other, "a") as processes,
        pytest.raises(CheckpointError, match="made for another 'a' than runs in its process"),
    ):
        graphs.LatentGraph.from_pretrained(tmp_path / "graph", processes=processes, settings=QUICK)


def test_a_lost_node_shows_nothing_until_it_is_back(config, caplog):
    with contextlib.ExitStack() as running:
        processes = running.enter_context(served(config, "a"))
        graph = graphs.build(config, processes=processes, settings=QUICK)
        batches = graph.read_texts(TEXTS)
        whole, without = graph(batches), graph(batches, without=["a"])
        assert whole.signals.lost == {}
        running.close()
        begun = time.monotonic()
        lost = graph(batches)
        assert time.monotonic() - begun < 10
        assert torch.equal(lost.logits, without.logits)
        assert "cannot be reached" in lost.signals.lost["a"]
        assert "answers without it" in caplog.text
        assert graph.choose([graphs.Question("Hi there", ("a", "b"), 0)])[0].lost == ("a",)
        graph.train()
        with pytest.raises(LinkError, match=r"node 'a' at 127.0.0.1:.* cannot be reached"):
            graph(batches)
        graph.eval()
        with pytest.raises(LinkError):
            graphs.calibrate(graph, [graphs.Question("Hi there", ("a", "b"), 0)])
        host, port = processes["a"].split(":")
        running.enter_context(served(config, "a", listen=(host, int(port))))
        assert torch.equal(graph(batches).logits, whole.logits)


def test_a_process_that_was_started_again_is_asked_at_once(config):
    with served(config, "a") as processes:
        graph = graphs.build(config, processes=processes, settings=QUICK)
        batches = graph.read_texts(TEXTS)
        whole = graph(batches).logits
    listen = (processes["a"].split(":")[0], int(processes["a"].split(":")[1]))
    with served(config, "a", listen=listen):
        again = graph(batches)
        assert again.signals.lost == {}
        assert torch.equal(again.logits, whole)
    with (
        served(changed(config, "a", layer=1), "a", listen=listen),
        pytest.raises(ConfigError, match="layer=3 in this graph and 1 in its process"),
    ):
        graph(batches)


def test_an_interrupt_leaves_no_answer_for_the_next_question(config, monkeypatch):
    from rc_agents.graph import remote

    with served(config, "a") as processes:
        graph = graphs.build(config, processes=processes, settings=QUICK)
        batches = graph.read_texts(TEXTS)
        whole = graph(batches).logits

        def interrupted(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(remote, "next_frame", interrupted)
            with pytest.raises(KeyboardInterrupt):
                graph(batches)
        again = graph(batches)
        assert again.signals.lost == {}
        assert torch.equal(again.logits, whole)


def test_whatever_breaks_there_is_told_and_the_next_question_is_answered(config, monkeypatch):
    with served(config, "a") as processes:
        graph = graphs.build(config, processes=processes, settings=QUICK)
        batches = graph.read_texts(TEXTS)
        with monkeypatch.context() as patched:
            broken = "rc_agents.graph.serving.tokenize"
            patched.setattr(broken, lambda *args: [][1])
            with pytest.raises(ModelRunError, match=r"node 'a': .*list index out of range"):
                graph(batches)
        assert graph(batches).signals.lost == {}


def test_passes_without_gradients_are_not_held_there(config):
    learned = changed(config, "c", learn_strength=True)
    server = graphs.NodeServer(learned, "c", settings=QUICK)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        processes = {"c": "{}:{}".format(*server.address)}
        graph = graphs.build(learned, processes=processes, settings=QUICK)
        with torch.no_grad():
            graph(graph.read_texts(TEXTS))
        assert not server.held
        graph(graph.read_texts(TEXTS))
        assert [len(one) for one in server.held.values()] == [1]
    finally:
        server.close()
        thread.join()


def test_what_needs_a_model_here_says_so(config, tmp_path):
    question = graphs.Question("Hi there", ("a", "b"), 0)
    with served(config, "a") as processes:
        graph = graphs.build(config, processes=processes, settings=QUICK)
        with pytest.raises(ConfigError, match="node 'a' has no model in this process"):
            graphs.letter_probabilities(graph, "a", [])
        with pytest.raises(ConfigError, match="node 'a' has no model in this process"):
            graphs.answer_probabilities(graph, "a", [question])
        with pytest.raises(TrainingError, match="'a' runs in another"):
            graphs.Kept(graph, tmp_path)
        with pytest.raises(ConfigError, match="tokenizers names 'a', which runs in another"):
            graphs.build(config, processes=processes, tokenizers={"a": None}, settings=QUICK)


def test_a_silent_process_is_given_up_in_time(config):
    class Silent(graphs.NodeServer):
        def _answer(self, channel, frame):
            time.sleep(2)
            return super()._answer(channel, frame)

    server = Silent(config, "a", settings=QUICK)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        hurried = NodeSettings(deadline=0.3, deadline_per_token=0, join=5.0)
        host, port = server.address
        graph = graphs.build(config, processes={"a": f"{host}:{port}"}, settings=hurried)
        output = graph(graph.read_texts(TEXTS))
        assert "did not answer within 0.3 s" in output.signals.lost["a"]
    finally:
        server.close()
        thread.join()


def test_a_text_that_the_other_process_cannot_read_is_said_in_one_line(config):
    with served(config, "a") as processes:
        graph = graphs.build(config, processes=processes, settings=QUICK)
        long = graph.read_texts(
            {name: ["the house " * (5000 if name == "a" else 1)] for name in "abcd"}
        )
        with pytest.raises(InputError, match=r"longer than the .* that node 'a' reads"):
            graph(long)
        assert graph(graph.read_texts(TEXTS)).signals.lost == {}  # it goes on


def test_who_does_not_belong_is_refused(config):
    with served(config, "a") as processes:
        with pytest.raises(LinkError, match="node 'a' runs here, not 'b'"):
            graphs.build(config, processes={"b": processes["a"]}, settings=QUICK)
        other = changed(config, "a", layer=2)
        with pytest.raises(ConfigError, match="has layer=2 in this graph and 3 in its process"):
            graphs.build(other, processes=processes, settings=QUICK)
        stranger = NodeSettings(secret=b"another secret of theirs", join=3.0)
        with pytest.raises(LinkError, match=r"cannot be reached: .*secret"):
            graphs.build(config, processes=processes, settings=stranger)
    with pytest.raises(LinkError, match="cannot be reached"):
        graphs.build(config, processes=processes, settings=QUICK)
    with pytest.raises(ConfigError, match="open to the network"):
        graphs.NodeServer(config, "a", listen=("0.0.0.0", 0))
    with pytest.raises(ConfigError, match="the graph has no node 'e'"):
        graphs.NodeServer(config, "e")
    voiced = {**config, "output": {"readout": "vocabulary", "width": 16}}
    with (
        served(voiced, "d") as processes,
        pytest.raises(ConfigError, match="'d' speaks in this process"),
    ):
        graphs.build(voiced, processes=processes, settings=QUICK)


def test_a_passes_graph_serves_one_backward_and_only_the_last_are_kept(config):
    with served(config, "c") as processes:
        graph = graphs.build(config, processes=processes, settings=QUICK)
        outputs = [graph(graph.read_texts(TEXTS)).logits.sum() for _ in range(9)]
        outputs[-1].backward()
        with pytest.raises(RCError, match=r"its pass .* is gone"):
            outputs[0].backward()


def test_the_command_line_asks_other_processes(config, tmp_path, capsys):
    graphs.build(config).save_pretrained(tmp_path / "graph")
    asked = [{"question": text, "choices": ["yes", "no"], "label": 0} for text in TEXTS]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    words = ["graph", "eval", tmp_path / "graph", "--questions", tmp_path / "asked.jsonl"]
    with served(config, "a", "c", settings=NodeSettings()) as processes:
        given = [f"{name}={address}" for name, address in processes.items()]
        options = [word for one in given for word in ("--process", one)]
        assert run([str(word) for word in [*words, "--json", *options]]) == 0
        there = json.loads(capsys.readouterr().out)
    assert run([str(word) for word in [*words, "--json"]]) == 0
    assert there["right"] == json.loads(capsys.readouterr().out)["right"]
    assert run([str(word) for word in [*words, "--process", "a"]]) != 0
    assert "--process takes NODE=HOST:PORT, once a node, got 'a'" in capsys.readouterr().err


def test_the_command_line_runs_a_node(config, tmp_path, capsys, monkeypatch):
    file = tmp_path / "graph.yaml"
    file.write_text(json.dumps(config))
    monkeypatch.setattr(graphs.NodeServer, "serve", lambda self: None)
    words = ["graph", "node", str(file), "--name", "b", "--listen", "127.0.0.1:0"]
    assert run(words) == 0
    assert capsys.readouterr().out.startswith("b listens on 127.0.0.1:")
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("address").startswith("127.0.0.1:")
    assert told == {"node": "b"}
    assert run([*words[:-1], "0.0.0.0:0"]) != 0
    assert "give every process the same secret" in capsys.readouterr().err


@pytest.mark.slow
def test_a_node_started_by_the_command_line_answers_and_dies(config, tmp_path):
    file = tmp_path / "graph.yaml"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "rc_agents.cli", "graph", "node", str(file), "--name", "b"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=environment,
    ) as process:
        try:
            address = process.stdout.readline().split()[-1]
            graph = graphs.build(config, processes={"b": address}, settings=QUICK)
            batches = graph.read_texts(TEXTS)
            here = graphs.build(config)
            expected = here(here.read_texts(TEXTS)).logits
            assert torch.allclose(graph(batches).logits, expected, atol=1e-5)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert set(graph(batches).signals.lost) == {"b"}
        finally:
            process.kill()


def test_tokenizers_stay_with_their_models(config):
    assert tiny_tokenizer("prose")(TEXTS[0]) != tiny_tokenizer("metaspace")(TEXTS[0])
    with served(config, "b") as processes:
        graph = graphs.build(config, processes=processes, settings=QUICK)
        assert graph.read_texts(TEXTS)["b"] == {"texts": TEXTS}
