"""Graphs that are trained: composition, kept states, resumption, calibration, and the questions themselves."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from rc_agents.benchmarks import composition
from rc_agents.benchmarks.statistics import wilson
from transformers import TrainerCallback

from rc_agents import graph as graphs
from rc_agents import questions
from rc_agents.errors import RCError
from rc_agents.graph.choosing import Choice, best_temperature, calibration_error
from rc_agents.training import data
from tests.graphs import TEXTS, on_disk, plain, small

pytestmark = pytest.mark.tiny

CHOICES = ("one", "two", "three", "four")
ASKED = [
    questions.Question(f"What is the number {n} called?", CHOICES[: 3 + n % 2], n % 3)
    for n in range(24)
]
QUICK = graphs.GraphTrainConfig(steps=6, batch_size=4, log_steps=2, eval_steps=2)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("rc_agents.training.plots.draw", lambda metrics, folder: [])


# Composition: the exclusive or of what two nodes see.

STEPS = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


def test_the_parts_of_the_task_share_nothing():
    parts = composition.questions()
    sides = [{(one.texts["left"], one.texts["right"]) for one in part} for part in parts]
    assert [len(side) for side in sides] == list(composition.SIZES)
    assert not sides[2] & (sides[0] | sides[1])
    assert not sides[0] & sides[1]
    assert all(sum(one.label for one in part) == len(part) // 2 for part in parts)


def test_two_nodes_together_solve_what_neither_can(folder):
    found = composition.run(composition.graph_config(), 0, folder, STEPS)
    assert sum(found["right"]) >= 0.95 * found["count"]
    assert found["without"]["left"] < 0.6
    assert found["without"]["right"] < 0.6


@pytest.mark.parametrize(
    "name", ["left", *(pytest.param(one, marks=pytest.mark.slow) for one in ("right", "judge"))]
)
def test_no_head_on_a_single_node_solves_it(folder, name):
    config = composition.methods()[f"head_{name}"]
    found = composition.run(config, 0, folder, STEPS)
    assert found["parameters"] >= composition.build(composition.graph_config()).num_trainable()
    assert wilson(sum(found["right"]), found["count"]).low < 0.5


# Kept states.


@pytest.mark.parametrize(
    "judge",
    [
        {"hears": ["a", "b"], "at": 2},
        {"hears": ["a", "b"], "at": 2, "pooling": "mean"},
        {"hears": ["a", "b"], "at": 2, "pooling": "attention", "layer": 4},
        {"hears": ["a", "b"], "at": 3, "position": "all"},
    ],
    ids=lambda judge: "-".join(str(judge.get(key, "last")) for key in ("position", "pooling")),
)
def test_a_step_on_kept_states_is_a_step_on_the_whole_graph(judge, tmp_path):
    graph = small(plain(nodes={"c": judge, "d": judge}))
    labels = torch.tensor([0, 1, 2, 3])
    kept = graphs.Kept(graph, tmp_path, progress=False)
    kept.complete(TEXTS)
    replay = graphs.Replay(graph, kept)
    replay.check(TEXTS)
    whole = graph(graph.read_texts(TEXTS), labels=labels)
    whole.loss.backward()
    expected = {
        name: one.grad.clone() for name, one in graph.trainable_parameters() if one.grad is not None
    }
    graph.zero_grad()
    found = graph(run=replay.of(TEXTS), labels=labels)
    found.loss.backward()
    torch.testing.assert_close(found.logits, whole.logits, rtol=0, atol=1e-5)
    for name, one in graph.trainable_parameters():
        if name in expected:
            torch.testing.assert_close(one.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_states_are_computed_once(tmp_path, monkeypatch):
    graph = small()
    graphs.Kept(graph, tmp_path, progress=False).complete(TEXTS)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(graph.nodes)
    again = graphs.Kept(graph, tmp_path, progress=False)
    monkeypatch.setattr(graphs.Kept, "_compute", lambda *args: pytest.fail("computed again"))
    again.complete(TEXTS)
    assert torch.equal(again.row("b", TEXTS[0])["states"], again.row("b", TEXTS[0])["states"])


def test_other_models_have_other_states(tmp_path):
    graph = small()
    first = graphs.Kept(graph, tmp_path, progress=False)
    with torch.no_grad():
        graph.nodes["a"].model.get_input_embeddings().weight.add_(1)
    second = graphs.Kept(graph, tmp_path, progress=False)
    assert first.key("a") != second.key("a")
    assert first.key("b") == second.key("b")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RCError, match="cannot keep states in"):
        graphs.Kept(small(), tmp_path / "file", progress=False).complete(TEXTS)


# A run, broken off and resumed.


RESUMED = graphs.GraphTrainConfig(
    steps=8, batch_size=4, log_steps=2, eval_steps=2, save_steps=1, learning_rate=1e-2
)


def _train(folder, output, callbacks=(), **options):
    graph = on_disk(folder / "models")
    done = graphs.train(
        graph,
        ASKED[:16],
        output,
        RESUMED,
        validation=ASKED[16:],
        keep=folder / "states",
        callbacks=callbacks,
        progress=False,
        **options,
    )
    return graph, done


class _Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return (folder, *_train(folder, folder / "graph"))


@pytest.mark.parametrize("step", [1, 5])
def test_a_resumed_run_ends_with_the_same_bits(unbroken, step, tmp_path):
    folder, expected, done = unbroken
    with pytest.raises(KeyboardInterrupt):
        _train(folder, tmp_path / "graph", [_Stop(step)])
    graph, found = _train(folder, tmp_path / "graph", resume=True)
    assert found.history == done.history
    assert found.evaluations == done.evaluations
    for (name, one), (_, other) in zip(
        graph.trainable_parameters(), expected.trainable_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    saved = [next((place / "graph").glob("edges-*")).name for place in (folder, tmp_path)]
    assert saved[0] == saved[1]


def _in_process(folder, output, resume):
    import rc_agents.training.plots as plots

    plots.draw = lambda metrics, place: []
    torch.set_num_threads(1)
    _train(Path(folder), Path(output), resume=resume)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(unbroken, tmp_path):
    folder = unbroken[0]
    context = multiprocessing.get_context("spawn")
    output, kills, resume = tmp_path / "graph", 0, False
    while kills < 5:
        process = context.Process(target=_in_process, args=(folder, output, resume))
        process.start()
        unfinished = output.with_name("graph.unfinished")
        before = _steps(unfinished)
        while process.is_alive() and _steps(unfinished) == before:
            time.sleep(0.02)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        resume = unfinished.is_dir()
        if not resume:
            break
    if resume:
        _in_process(folder, output, True)
    assert kills >= 3
    names = [next(place.glob("edges-*")).name for place in (folder / "graph", output)]
    assert names[0] == names[1]


def _steps(folder):
    found = [int(one.name.split("-")[1]) for one in folder.glob("checkpoint-*")]
    return max(found, default=0)


def test_a_run_leaves_how_it_was_made(unbroken):
    folder, graph, done = unbroken
    lines = (folder / "graph/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [entry for entry in map(json.loads, lines) if "loss" in entry][-1]
    assert {"gradient/encode/a", "gradient/hear/c", "routing/c", "similarity/a/b"} <= last.keys()
    assert sum(last[f"routing/{name}"] for name in graph.config.read) == pytest.approx(1)
    assert last["weight/c/a"] == pytest.approx(0.5)
    assert done.best_step in {entry["step"] for entry in done.evaluations}


def test_another_run_is_not_resumed(unbroken, tmp_path):
    folder = unbroken[0]
    with pytest.raises(KeyboardInterrupt):
        _train(folder, tmp_path / "graph", [_Stop(3)])
    graph = on_disk(folder / "models")
    with pytest.raises(RCError, match="steps was 8, now it is 9"):
        graphs.train(
            graph,
            ASKED[:16],
            tmp_path / "graph",
            dataclasses.replace(RESUMED, steps=9),
            validation=ASKED[16:],
            resume=True,
            progress=False,
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda graph: graphs.train(graph, []), "got none"),
        (lambda graph: graphs.train(graph, ASKED, validation=ASKED[:2]), "share 2 examples"),
        (
            lambda graph: graphs.train(graph, [data.Pair("a", "b")]),
            "questions with choices, got Pair",
        ),
        (lambda graph: graphs.train(graph, ASKED, resume=True), "name an output"),
        (
            lambda graph: graphs.train(graph, ASKED, config=graphs.GraphTrainConfig(patience=1)),
            "patience needs",
        ),
        (
            lambda graph: graphs.train(
                graph, [questions.Question("a", tuple("abcdef"), 0)], config=QUICK
            ),
            "has 6 choices and the output scores 4",
        ),
    ],
)
def test_runs_that_cannot_work_are_refused_in_one_line(call, message):
    with pytest.raises(RCError, match=message):
        call(small())


def test_rates_that_are_no_rates_are_refused():
    with pytest.raises(RCError, match="output_learning_rate must be positive"):
        graphs.GraphTrainConfig(output_learning_rate=0)
    with pytest.raises(RCError, match="steps must be positive"):
        graphs.GraphTrainConfig(steps=0)


def test_a_voice_learns_to_answer():
    graph = small(plain(output={"readout": "vocabulary", "width": 16}))
    pairs = [data.Pair(f"Say {word}:", " water") for word in ("this", "that", "one", "two")]
    config = graphs.GraphTrainConfig(steps=25, batch_size=4, learning_rate=3e-2, log_steps=1)
    done = graphs.train(graph, pairs, config=config, progress=False)
    assert done.history[-1]["loss"] < 0.7 * done.history[0]["loss"]


def test_a_graph_of_answers_reads_one_text_a_choice():
    graph = small(plain(output={"layout": "answered", "width": 16}))
    asked = graphs.ask(graph.config, ASKED[:3])
    assert [len(one.texts["a"]) for one in asked] == [3, 4, 3]
    assert asked[0].texts["a"][1].endswith("Answer: two")
    choices = graph.choose(ASKED[:3], batch_size=2)
    assert [len(one.probabilities) for one in choices] == [3, 4, 3]
    alone = [graph.choose([one])[0] for one in ASKED[:3]]
    for one, other in zip(choices, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    graphs.train(graph, ASKED[:8], config=QUICK, progress=False)


# Calibration.


def test_the_temperature_undoes_a_scale():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 4, generator=generator)
    labels = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
    assert best_temperature(3 * scores, labels) == pytest.approx(3, rel=0.1)


def test_the_calibration_error_is_the_gap_between_sure_and_right():
    sure = Choice(0, None, (0.9, 0.1), {})
    assert calibration_error([sure] * 10, [0] * 9 + [1]) == pytest.approx(0, abs=1e-6)
    assert calibration_error([sure] * 10, [1] * 10) == pytest.approx(0.9)
    with pytest.raises(RCError, match="as many labels as choices"):
        calibration_error([sure], [])


# The questions.


def test_parts_share_no_question_and_no_near_duplicate():
    every = [
        questions.Question(f"Which of the {n} rivers runs down to the great grey sea?", CHOICES, 0)
        for n in range(40)
    ]
    other = [
        questions.Question(f"Who lives in house {n * 7919} of town {n}?", CHOICES, 1)
        for n in range(60)
    ]
    found = questions.parts([*every, *other], every[:1], validation=10)
    keys = [{one.key for one in part} for part in (found.train, found.validation, found.test)]
    assert not keys[0] & keys[1]
    assert not (keys[0] | keys[1]) & keys[2]
    near = list(
        data.near_duplicates(
            [one.question for one in found.train],
            [one.question for one in (*found.validation, *found.test)],
        )
    )
    assert not near
    assert found.dropped >= len(every)  # all of them are nearly the one in the test part


def test_questions_are_read_from_a_file_and_refused_in_one_line(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a", "choices": ["x", "y"], "label": 1}\n', encoding="utf-8")
    assert questions.read(file) == [questions.Question("a", ("x", "y"), 1)]
    for content, message in (
        ("", "holds no question"),
        ('{"question": "a"}', "line 1 of .* is no question"),
        ('{"question": "a", "choices": ["x", "y"], "label": 2}', "label 2"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(RCError, match=message):
            questions.read(file)
    with pytest.raises(RCError, match="no questions can be read"):
        questions.read(tmp_path / "missing.jsonl")
    with pytest.raises(RCError, match="known: arc_challenge"):
        questions.load("arc")
    with pytest.raises(RCError, match="ask for fewer"):
        questions.parts(ASKED, [], validation=100)


@pytest.mark.skipif(
    not os.environ.get("RC_AGENTS_DATA"), reason="the questions are not here: set RC_AGENTS_DATA"
)
@pytest.mark.parametrize(("name", "count"), [("arc_challenge", 1172), ("openbookqa", 500)])
def test_real_questions_are_disjoint(name, count):
    found = questions.load(name, validation=200)
    assert len(found.test) == count
    keys = [{one.key for one in part} for part in (found.train, found.validation, found.test)]
    assert not keys[0] & keys[1]
    assert not (keys[0] | keys[1]) & keys[2]


def test_a_question_is_written_by_letter_or_as_answered():
    one = questions.Question("What is it? ", ("this", "that"), 0)
    assert questions.lettered(one) == "Question: What is it?\nA. this\nB. that\nAnswer:"
    assert questions.answered(one) == [
        "Question: What is it?\nAnswer: this",
        "Question: What is it?\nAnswer: that",
    ]


# From outside.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    on_disk(folder / "models").save_pretrained(folder / "graph")
    return folder


def test_the_command_line_trains_answers_and_draws(trained, tmp_path, capsys):
    import yaml

    from rc_agents.cli import run

    rows = [{"question": one.question, "choices": one.choices, "label": one.label} for one in ASKED]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = json.loads((trained / "graph/graph.json").read_text(encoding="utf-8"))["graph"]
    (tmp_path / "graph.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    line = ["graph", "train", str(tmp_path / "graph.yaml"), str(tmp_path / "out")]
    line += ["--questions", str(file), "--validation", "6", "--steps", "3", "--batch-size", "4"]
    assert run([*line, "--ridge", "--keep", str(tmp_path / "states"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    ask = ["graph", "eval", str(tmp_path / "out"), "--questions", str(file), "--limit", "5"]
    assert run([*ask, "--leave-one-out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["count"] == 5
    assert set(found["without"]) == {"a", "b", "c", "d"}
    assert run(ask) == 0
    assert "of 5" in capsys.readouterr().out
    assert run(["graph", "show", str(tmp_path / "out"), "--output", str(tmp_path / "g.svg")]) == 0
    loaded = graphs.load(tmp_path / "out")
    routing = loaded.routing
    assert sum(routing.values()) == pytest.approx(1)
    drawn = (tmp_path / "g.svg").read_text(encoding="utf-8")
    assert f"{routing['c']:.0%}" in drawn
    for module in loaded.hear.values():
        assert f">{float(module.strength()):.2f}<" in drawn
    described = json.loads((tmp_path / "out/graph.json").read_text(encoding="utf-8"))
    for node in described["graph"]["nodes"].values():
        node["model"]["base"] = "gone"  # no model is loaded for a picture
    (tmp_path / "out/graph.json").write_text(json.dumps(described), encoding="utf-8")
    assert run(["graph", "show", str(tmp_path / "out"), "--output", str(tmp_path / "g.svg")]) == 0
    elsewhere = (tmp_path / "g.svg").read_text(encoding="utf-8")
    assert elsewhere.count("gone") == 4
    whole = graphs.draw(loaded)
    assert re.findall(r">[\d.%]+<", elsewhere) == re.findall(r">[\d.%]+<", whole)
    read = re.findall(r"(?:hears|read) at \d+(?!%)", whole)
    assert len(read) >= 4
    assert re.findall(r"(?:hears|read) at \d+(?!%)", elsewhere) == read
    capsys.readouterr()
    assert run(["graph", "show", str(tmp_path / "graph.yaml")]) == 0
    picture = capsys.readouterr().out
    assert "<svg" in picture
    assert run(["graph", "show", str(tmp_path / "graph.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"svg": picture}
    drawn = ["graph", "show", str(tmp_path / "graph.yaml"), "--output", str(tmp_path / "h.svg")]
    assert run([*drawn, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "h.svg")}
    assert (tmp_path / "h.svg").read_text(encoding="utf-8") == picture
    assert run(["graph", "show", str(tmp_path / "nothing")]) == 2
    assert "no graph at" in capsys.readouterr().err


def test_one_command_trains_the_published_graph(tmp_path, monkeypatch, capsys):
    import importlib

    from rc_agents.cli import run
    from tests.tiny import saved

    published = importlib.import_module("rc_agents.graph.published")
    for level in ("LEVEL_ONE", "LEVEL_TWO"):
        stand_ins = {
            name: str(saved(tmp_path / name, published.KINDS[name], "prose"))
            for name in getattr(published, level)
        }
        monkeypatch.setattr(published, level, stand_ins)
    rows = [
        {"question": f"What is {n}?", "choices": list("abcde"), "label": n % 5} for n in range(12)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    line = ["graph", "train", "published", str(tmp_path / "out"), "--questions", str(file)]
    assert run([*line, "--validation", "4", "--steps", "1", "--batch-size", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    config = graphs.load(tmp_path / "out").config
    assert config.levels == [["llama", "qwen", "gemma"], ["phi", "mistral"]]
    assert (config.latent.width, config.output.choices) == (1024, 5)


async def test_the_langchain_tool_gives_calibrated_probabilities(trained):
    pytest.importorskip("langchain_core", reason="the tool needs the extra langchain")
    from rc_agents.adapters.langchain import MultipleChoice

    tool = MultipleChoice(graph=str(trained / "graph"))
    asked = {"question": "What is it?", "choices": ["this", "that", "those"]}
    found = tool.invoke(asked)
    assert found["answer"] in asked["choices"]
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert await tool.ainvoke(asked) == found
    with pytest.raises(ValueError, match="choices"):
        tool.invoke({"question": "What is it?", "choices": ["this"]})
