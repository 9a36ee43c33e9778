"""A run that is killed goes on to the same bits; what cannot be resumed is said in one line."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from rc_agents import CoupledForCausalLM
from rc_agents.errors import TrainingError
from rc_agents.training import checkpoints, run_folder
from tests.training_runs import PAIRS, RUN, TEXTS, bases, killed_and_resumed, outcome, run

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Plots have a test of their own; a kill loses nothing that the kernel has, as a power cut would."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr("rc_agents.training.plots.draw", lambda metrics, folder: [])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The output of a run that nobody disturbs."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    run(folder, output)
    return output


@pytest.fixture(scope="module")
def unbroken(finished):
    return outcome(finished)


class Stop(Exception):
    """Ends a run in the middle."""


def stopped_after(steps):
    class Stopping(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step >= steps:
                raise Stop

    return Stopping()


def cut_short(folder, output, steps, **changes):
    """A run that ends before the step behind `steps`."""
    with pytest.raises(Stop):
        run(folder, output, callbacks=[stopped_after(steps)], **changes)
    return output.with_name("out.unfinished")


def test_three_kills_change_no_bit(folder, unbroken, tmp_path):
    seen = killed_and_resumed(folder, tmp_path / "out", 3, seed=0)
    assert len(seen) == 3
    assert outcome(tmp_path / "out") == unbroken
    commands = json.loads((tmp_path / "out" / "run" / "config.json").read_text())["commands"]
    assert len(commands) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_twelve_kills_each_change_no_bit(folder, tmp_path, seed):
    changes = {"steps": 60, "patience": 50, "gradient_accumulation": seed}
    run(folder, tmp_path / "unbroken", **changes)
    seen = killed_and_resumed(folder, tmp_path / "out", 12, seed=seed, **changes)
    print(*seen, sep="\n")
    assert len(seen) == 12
    assert outcome(tmp_path / "out") == outcome(tmp_path / "unbroken")


@pytest.fixture(scope="module")
def interrupted(folder, tmp_path_factory):
    """The folder of a run that ended before its sixth step, with three checkpoints."""
    return cut_short(folder, tmp_path_factory.mktemp("cut") / "out", 5, keep=3)


@pytest.fixture
def cut(interrupted, tmp_path):
    """A copy of it, and the output that it was to make."""
    shutil.copytree(interrupted, tmp_path / "out.unfinished")
    return tmp_path / "out.unfinished", tmp_path / "out"


def test_checkpoints_hold_the_bridges_alone_and_the_last_few_are_kept(interrupted):
    assert checkpoints.steps(interrupted) == [3, 4, 5]
    place = interrupted / "checkpoint-5"
    assert {path.name for path in place.iterdir()} == {
        "best.safetensors",
        "bridges.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "progress.json",
        "trainer_state.json",
    }
    held = load_file(place / "bridges.safetensors")
    assert held
    assert not any(name.startswith("lm_") for name in held)
    assert not list(interrupted.glob(".saving-*"))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "trainer_state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(cut, name, harm):
    file = cut[0] / "checkpoint-5" / name
    content = file.read_bytes()
    file.unlink()
    if harm == "truncated":
        file.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"checkpoint-5 is damaged .*; trying the one before"):
        assert checkpoints.last(cut[0]) == cut[0] / "checkpoint-4"


def test_from_the_one_before_it_goes_on_to_the_same_bits(folder, unbroken, cut):
    (cut[0] / "checkpoint-5" / "bridges.safetensors").write_bytes(b"")
    shutil.rmtree(cut[0] / "checkpoint-4")
    with pytest.warns(UserWarning, match="checkpoint-5 is damaged"):
        run(folder, cut[1], resume=True)
    assert outcome(cut[1]) == unbroken


def test_a_finished_loop_is_only_saved(folder, unbroken, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(CoupledForCausalLM, "save_pretrained", refuse)
        with pytest.raises(Stop):
            run(folder, tmp_path / "out")
    run(folder, tmp_path / "out", resume=True)
    assert outcome(tmp_path / "out") == unbroken


CHANGES = {
    "a learning rate": ({"learning_rate": 0.5}, "learning_rate was 0.01, now it is 0.5"),
    "a length": ({"steps": 13}, "steps was 12, now it is 13"),
    "data": ({"data": [*PAIRS[1:], *TEXTS]}, "the validation set holds other examples than before"),
    "a choice": ({"only": "b"}, r'only was null, now it is \["b"\]'),
    "all damaged": ({}, "all 3 checkpoints in .* are damaged; start anew without resume"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
def test_another_run_is_not_resumed(folder, cut, case):
    changes, message = CHANGES[case]
    if case == "all damaged":
        for manifest in cut[0].glob("*/manifest.json"):
            manifest.write_text("{")
    with pytest.raises(TrainingError, match=message) as caught:
        run(folder, cut[1], resume=True, **changes)
    assert "\n" not in str(caught.value)
    assert cut[0].is_dir()


def test_nothing_to_resume_is_named_and_makes_no_folder(folder, tmp_path):
    with pytest.raises(TrainingError, match="nothing to resume: there is no unfinished run in"):
        run(folder, tmp_path / "out", resume=True)
    assert not list(tmp_path.iterdir())


def test_a_new_run_over_an_unfinished_one_warns(cut):
    with pytest.warns(UserWarning, match="holds the checkpoints of an unfinished run"):
        run_folder.begin(cut[0], {})
    assert not checkpoints.steps(cut[0])


def test_a_full_disk_leaves_the_checkpoints_before(cut, monkeypatch):
    def refuse(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(TrainingError, match=r"cannot save a checkpoint to .*: No space left"):
        checkpoints.save(cut[0], 6, {"a.json": b"{}"}, keep=1)
    assert checkpoints.steps(cut[0]) == [3, 4, 5]
    assert not list(cut[0].glob(".saving-*"))


def test_a_run_says_how_it_was_made(finished):
    found = json.loads((finished / "run" / "config.json").read_text())
    assert found["config"]["retain_positions"] == RUN["retain_positions"]
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["commands"]) == 1
    assert found["examples"]["data"] > 1
    assert not list((finished / "run").glob("checkpoint-*"))
    assert not finished.with_name("out.unfinished").exists()
