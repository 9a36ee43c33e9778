"""The documentation site: it builds without a warning, and what it says of errors is what the code says."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("rc_agents/**/*.py"), *ROOT.glob("adapters/**/*.py")]


def test_every_message_of_the_troubleshooting_page_is_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    told = [part for row in rows for part in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(rows) >= 12
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that go on in the next line
    assert [one for one in told if one not in code] == []


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs-material and mkdocstrings")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    for page in ("concepts", "examples", "api", "readme", "adr"):
        assert (tmp_path / page / "index.html").is_file(), page
    reference = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", reference)
    for name in ("rc_agents.couple", "GenerationParams", "create_app", "EnsembleLM"):
        assert name in text
    assert "_find_source" not in text  # what is private stays out
