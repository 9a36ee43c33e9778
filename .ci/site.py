"""What the documentation site needs besides the pages in docs/: pages from the root, and their links."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(!?\[([^\]]*)\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Adds the root's pages, one page with all examples, and what belongs to no page."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=text))
    parts = [
        "# Examples",
        "Each runs in CI, on tiny models; `python examples/NAME.py` runs it on the packaged ones.",
    ]
    for path in sorted((ROOT / "examples").rglob("*.py"), key=lambda one: (len(one.parts), one)):
        name = path.relative_to(ROOT / "examples").with_suffix("").as_posix()
        parts.append(f"## {name}\n\n```python\n{path.read_text(encoding='utf-8')}```")
    files.append(File.generated(config, "examples.md", content="\n\n".join(parts)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links into the repository into links into the site; what is not on the site loses its link."""
    own = page.file.src_uri
    at_root = {target: source for source, target in PAGES.items()}
    here = PurePosixPath(at_root[own]) if own in at_root else PurePosixPath("docs") / own

    def mend(found: re.Match[str]) -> str:
        head, text, link, anchor, tail = found.groups()
        if "://" in link or link.startswith("mailto:"):
            return found[0]
        place = normpath(str(here.parent / link))
        target = PAGES.get(place) or ("examples.md" if place.startswith("examples") else None)
        target = target or place.removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            return str(text) if (ROOT / place).exists() else found[0]
        return f"{head}{relpath(target, str(PurePosixPath(own).parent))}{anchor or ''}{tail}"

    return LINK.sub(mend, markdown)
