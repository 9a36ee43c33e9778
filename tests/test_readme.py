"""The Python code of pages runs, in order and in one namespace a page, on tiny models."""

import re
from pathlib import Path

import pytest

from tests.pages import GIVEN, SWAPS
from tests.stand_ins import run_on_tiny_models

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("benchmarks", "serving")
"""Pages whose code runs in `tests/test_bench.py`, and against a server below."""
PAGES = [
    page for page in DOCS if page.stem not in ELSEWHERE and BLOCK.search(page.read_text("utf-8"))
]


def test_pages_with_code_are_found():
    assert {"README", "alignment", "integrations", "training"} <= {page.stem for page in PAGES}
    assert {*GIVEN, *SWAPS} <= {page.stem for page in PAGES}


@pytest.mark.tiny
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for written, smaller in SWAPS.get(page.stem, {}).items():
        assert written in text, f"{page.name} does not say {written!r} any more"
        text = text.replace(written, smaller)
    names = {"__name__": "__main__", **GIVEN.get(page.stem, lambda _: {})(tmp_path / "given")}
    for block in BLOCK.finditer(text):
        lines_above = "\n" * text.count("\n", 0, block.start(1))  # so that tracebacks point there
        run_on_tiny_models(lines_above + block[1], page, tmp_path / "stand-ins", names)


@pytest.mark.tiny
def test_the_servers_page_runs_against_a_server(tmp_path, monkeypatch):
    from tests.server_running import running
    from tests.test_server import MODEL

    page = ROOT / "docs" / "serving.md"
    first, second = (block[1] for block in BLOCK.finditer(page.read_text(encoding="utf-8")))
    with running(MODEL) as server:
        code = first.replace("http://127.0.0.1:8000", server.url)
        names = {"__name__": "__main__"}
        run_on_tiny_models(
            code.replace("messages=", "max_tokens=4, messages="), page, tmp_path, names
        )
    assert names["answer"].choices[0].message.content
    names["client"].close()
    run_on_tiny_models(second, page, tmp_path, names)
    assert [one.completion_tokens for one in names["answers"]] == [16, 16, 16]
