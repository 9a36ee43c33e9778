"""Command lines in the documentation name commands, options, modules, targets and extras that are there."""

import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from rc_agents.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(ROOT / "docs" / "cli.md")  # generated from the commands themselves
FENCE = re.compile(r"^```(?:bash|console|text)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
GROUP = typer.main.get_command(app)
ALWAYS = {"-h", "--help", "--debug"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {*PROJECT["optional-dependencies"]}


def found():
    """Yields page and command line, from blocks and from running text."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [line for block in FENCE.findall(text) for line in lines(block)]
        inline = INLINE.findall(re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
        for line in (*blocks, *inline):
            words = command(line)
            if words:
                yield pytest.param(words, id=f"{page.stem}: {' '.join(words)}"[:90])


def lines(block):
    return [one.removeprefix("$ ") for one in block.replace("\\\n", " ").splitlines()]


def command(line):
    """The words of a line that is one of our commands, without what stands before it; nothing for any other."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # no shell
        return []
    while words and re.fullmatch(r"[A-Z_]+=.*|export", words[0]):
        words.pop(0)
    if words:
        words[0] = words[0].removeprefix(".venv/bin/")
    ours = words[:1] in (["rc-agents"], ["make"]) or words[:2] == ["python", "-m"]
    return words if ours and len(words) > 1 else []


def problem(words):
    """What is wrong with a command line, or nothing."""
    if words[0] == "make":
        wrong = [one for one in words[1:] if one not in TARGETS and "=" not in one and one != "…"]
        return f"no target {wrong[0]!r}" if wrong else ""
    if words[0] == "python":
        return module_problem(words[2], options(words[3:]))
    group, rest = GROUP, words[1:]
    while rest and hasattr(group, "commands") and not rest[0].startswith("-"):
        if rest[0] not in group.commands:
            return f"no command {rest[0]!r}"
        group, rest = group.commands[rest[0]], rest[1:]
    known = ALWAYS | {name for one in group.params for name in (*one.opts, *one.secondary_opts)}
    wrong = options(rest) - known
    return f"{group.name} has no option {sorted(wrong)}" if wrong else ""


def module_problem(name, given):
    """What is wrong with `python -m`: of our own modules the options too, which argparse has as words."""
    try:
        place = find_spec(name)
    except ImportError:
        place = None
    if place is None:
        return f"no module {name!r}"
    if name.split(".")[0] not in ("rc_agents", "tests"):
        return ""
    source = Path(place.origin).read_text(encoding="utf-8")
    wrong = {one for one in given - ALWAYS if f'"{one}"' not in source}
    return f"{name} has no option {sorted(wrong)}" if wrong else ""


def options(words):
    return {one.split("=")[0] for one in words if re.match(r"--?[a-z]", one)}


COMMANDS = list(found())


def test_command_lines_are_found():
    said = {one.values[0][0] for one in COMMANDS}
    assert said == {"rc-agents", "make", "python"}
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_line_is_there(words):
    assert not problem(words)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("rc-agents chatt x", "no command 'chatt'"),
        ("rc-agents bench suits", "no command 'suits'"),
        ("rc-agents serve x --prot 1", "serve has no option ['--prot']"),
        ("make demoo", "no target 'demoo'"),
        ("python -m rc_agents.benchmarks.gone", "no module 'rc_agents.benchmarks.gone'"),
        ("python -m rc_agents.benchmarks.transfer --sets 3", "has no option ['--sets']"),
        ("RC_AGENTS_API_KEY=x rc-agents serve x --port 1", ""),
    ],
)
def test_what_is_not_there_is_seen(line, wrong):
    assert wrong in problem(command(line))
    assert bool(problem(command(line))) == bool(wrong)


def test_extras_are_there():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    named = {
        one.strip()
        for text in texts
        for found in re.findall(r"(?:rc-agents|-e '\.)\[([\w, -]+)\]", text)
        for one in found.split(",")
    }
    assert {"langchain", "serve"} <= named <= EXTRAS
