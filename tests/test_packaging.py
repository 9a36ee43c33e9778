"""What the distribution promises: names, dependencies, and what importing it costs."""

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rc_agents

ROOT = Path(__file__).parent.parent
CORE = {"torch", "transformers", "accelerate", "safetensors", "tokenizers", "greenlet"}
OPTIONAL = [
    "datasets",
    "fastapi",
    "gguf",
    "langchain_core",
    "llguidance",
    "lm_eval",
    "matplotlib",
    "peft",
    "simple_icd_10_cm",
    "typer",
]


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _name(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def _python(code):
    """Runs code in a fresh interpreter where no optional package can be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True)


@pytest.mark.parametrize("folder", ["adapters", "benchmarks"])
def test_a_top_level_folder_imports_under_its_full_name_alone(folder):
    assert importlib.import_module(f"rc_agents.{folder}")
    with pytest.raises(ImportError, match=f"installs as rc_agents.{folder}"):
        importlib.import_module(folder)


def test_the_core_needs_six_packages():
    assert {_name(one) for one in _project()["dependencies"]} == CORE


def test_every_pin_is_inside_its_range():
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    project = _project()
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in map(Requirement, (one for group in groups for one in group)):
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_version_is_the_same_everywhere():
    assert rc_agents.__version__ == _project()["version"] == importlib.metadata.version("rc-agents")


@pytest.fixture(scope="module")
def bare():
    """What an interpreter without any extra says to an import of the core, and then to the command line."""
    imports = "import rc_agents, rc_agents.adapters, rc_agents.benchmarks; print('imported')\n"
    return _python(imports + "from rc_agents.cli import main; main()")


def test_the_core_imports_without_extras(bare):
    assert bare.stdout.split() == ["imported"], bare.stderr


def test_the_command_line_names_the_extra_that_it_lacks(bare):
    assert bare.returncode != 0
    assert len(bare.stderr.strip().splitlines()) == 1
    assert "pip install" in bare.stderr
    assert "rc-agents[cli]" in bare.stderr
