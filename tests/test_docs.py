"""Generated pages are the ones that the code generates now."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    importlib.util.find_spec("rc_agents.cli") is None, reason="there is no command line yet"
)
def test_the_command_line_page_is_current(tmp_path):
    page = tmp_path / "cli.md"
    command = [
        "typer",
        "rc_agents.cli",
        "utils",
        "docs",
        "--name",
        "rc-agents",
        "--output",
        str(page),
    ]
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == written, "run: make docs"
