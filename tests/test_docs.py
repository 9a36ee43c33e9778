"""Generated pages are the ones that the code generates now."""

import importlib.util
from pathlib import Path

import pytest
import typer.cli
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    importlib.util.find_spec("rc_agents.cli") is None, reason="there is no command line yet"
)
def test_the_command_line_page_is_current(tmp_path):
    page = tmp_path / "cli.md"
    options = ["utils", "docs", "--name", "rc-agents", "--output", str(page)]
    done = CliRunner().invoke(typer.cli.app, ["rc_agents.cli", *options])
    assert done.exit_code == 0, done.output
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == written, "run: make docs"
