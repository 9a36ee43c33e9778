"""The README's Python code runs, in order and in one namespace, on tiny models."""

import re
from pathlib import Path

import pytest

from tests.stand_ins import run_on_tiny_models

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.tiny
def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, "README.md shows no Python code"
    names = {"__name__": "__main__"}
    for block in blocks:
        lines_above = "\n" * text.count("\n", 0, block.start(1))  # so that tracebacks point there
        run_on_tiny_models(lines_above + block[1], README, tmp_path / "stand-ins", names)
