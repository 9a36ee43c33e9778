"""`rc-agents train`, in this process, and training on cached states."""

import json
import sys

import pytest

from rc_agents import CoupledForCausalLM
from rc_agents.cli.app import run as command_line
from rc_agents.errors import TrainingError
from rc_agents.training.bridges import TrainConfig, train
from tests.ensembles import own_state, wake
from tests.training_runs import PAIRS, QUICK, TEXTS, bases, opened, small

pytestmark = pytest.mark.tiny


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("rc_agents.training.plots.draw", lambda metrics, folder: [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def words(folder, tmp_path):
    data, general = tmp_path / "pairs.jsonl", tmp_path / "general.txt"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    general.write_text("\n".join(TEXTS))
    return [
        *("train", str(data), str(tmp_path / "out"), "--anchor", str(folder / "a")),
        *("--specialist", f"b={folder / 'b'}", "--sites", "2", "--steps", "2"),
        *("--batch-size", "3", "--block-length", "16", "--retain", str(general)),
    ]


def test_the_settings_reach_the_run(words, tmp_path, capsys):
    more = [
        "--validation-share",
        "0.3",
        "--eval-steps",
        "1",
        "--patience",
        "5",
        "--save-steps",
        "1",
    ]
    more += ["--distill", "b", "--retain-positions", "8", "--only", "b", "--schedule", "linear"]
    assert command_line([*words, *more, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], len(found["evaluations"])) == (2, 2)
    described = json.loads((tmp_path / "out" / "run" / "config.json").read_text())
    wanted = {"distill_from": "b", "retain_positions": 8, "schedule": "linear", "patience": 5}
    assert wanted.items() <= described["config"].items()
    assert described["identity"]["ensemble"]["only"] == ["b"]
    assert CoupledForCausalLM.from_pretrained(tmp_path / "out").names == ["anchor", "b"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume"], "nothing to resume: there is no unfinished run in"),
        (["--only", "c"], "only='c': known: b"),
        (["--patience", "2"], "patience needs validation data"),
        (["--distill", "c"], "distill_from='c': known: fused, b"),
        (["--schedule", "steep"], "schedule is one of cosine, linear, constant, not 'steep'"),
        (["--topology", "star_bilateral", "--states", "STATES"], "unilateral"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, more, message, capsys, tmp_path):
    more = [word.replace("STATES", str(tmp_path / "states")) for word in more]
    assert command_line([*words, *more]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_training_on_cached_states_is_training(folder, tmp_path):
    trained = {}
    for states in (None, tmp_path / "states"):
        model = opened(folder)
        wake(model)
        config = TrainConfig(**{**QUICK, "learning_rate": 1e-3, "steps": 3, "eval_steps": 3})
        found = train(
            model,
            PAIRS,
            config=config,
            retain=TEXTS,
            validation=TEXTS,
            states=states,
            progress=False,
        )
        trained[states] = own_state(model), found
    (first, one), (second, other) = trained.values()
    assert other.evaluations[0]["eval_loss"] == pytest.approx(
        one.evaluations[0]["eval_loss"], abs=1e-3
    )
    for name, tensor in first.items():
        assert (second[name] - tensor).abs().max() < 1e-3, name


def test_bases_that_train_have_no_cached_states(tmp_path):
    with pytest.raises(TrainingError, match="train_bases changes what checkpoints and cached"):
        train(small(), PAIRS, train_bases=True, states=tmp_path, progress=False)


def test_the_interpreter_is_part_of_the_command(folder, tmp_path):
    config = TrainConfig(**{**QUICK, "steps": 1})
    train(opened(folder), PAIRS, tmp_path / "out", config, progress=False)
    described = json.loads((tmp_path / "out" / "run" / "config.json").read_text())
    assert described["commands"][0].startswith(sys.orig_argv[0])
