"""The Python code of pages runs, in order and in one namespace a page, on tiny models."""

import re
from pathlib import Path

import pytest

from tests.stand_ins import run_on_tiny_models

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "integrations.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.tiny
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page.name} shows no Python code"
    names = {"__name__": "__main__"}
    for block in blocks:
        lines_above = "\n" * text.count("\n", 0, block.start(1))  # so that tracebacks point there
        run_on_tiny_models(lines_above + block[1], page, tmp_path / "stand-ins", names)


@pytest.mark.tiny
def test_the_servers_page_runs_against_a_server(tmp_path, monkeypatch):
    from tests.server_running import running
    from tests.test_server import MODEL

    page = ROOT / "docs" / "serving.md"
    (block,) = BLOCK.finditer(page.read_text(encoding="utf-8"))
    with running(MODEL) as server:
        code = block[1].replace("http://127.0.0.1:8000", server.url)
        names = {"__name__": "__main__"}
        run_on_tiny_models(
            code.replace("messages=", "max_tokens=4, messages="), page, tmp_path, names
        )
    assert names["answer"].choices[0].message.content
    names["client"].close()
