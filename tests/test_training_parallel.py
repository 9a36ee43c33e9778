"""Two processes under `accelerate launch` train what one does with twice the gradient accumulation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training_runs import bases, run

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parent.parent
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def launched(folder, output, *words):
    """Runs `tests/train_parallel.py` in two processes on the CPU, which meet by gloo."""
    command = [sys.executable, *LAUNCH, "--num_processes", "2", "-m", "tests.train_parallel"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(folder), str(output), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def lines(output):
    text = (output / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_two_batches_a_step(tmp_path):
    folder = bases(tmp_path / "bases")
    launched(folder, tmp_path / "two", "1")
    run(folder, tmp_path / "one", steps=6, save_steps=2, gradient_accumulation=2)
    found, expected = (
        load_file(next((tmp_path / name).glob("bridges-*.safetensors"))) for name in ("two", "one")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-5, name
    for two, one in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert two.keys() == one.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    described = json.loads((tmp_path / "two" / "run" / "config.json").read_text())
    assert described["identity"]["processes"] == 2
