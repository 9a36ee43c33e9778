"""`rc-agents doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rc_agents.packaged.finding import install_command
from rc_agents.packaged.models import MODELS, cache_dir

CORE = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "greenlet")
INNER = ("dev", "demo")  # extras made of others


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what is installed, which extras are missing, and which devices and packaged models are there."""
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"Python {found['python']} on {found['system']}")
    rows = [(name, version or "missing") for name, version in found["core"].items()]
    console.print(_table("core", ("package", "version"), rows))
    extras = [
        (name, "ready" if not missing else "needs " + ", ".join(missing), _install(name, missing))
        for name, missing in found["extras"].items()
    ]
    console.print(_table("extras", ("extra", "state", "to install"), extras))
    console.print(_table("devices", ("device", "memory"), list(found["devices"].items())))
    models = [
        (
            name,
            "installed" if one["installed"] else "missing",
            "" if one["installed"] else one["install"],
        )
        for name, one in found["models"].items()
    ]
    console.print(_table("packaged models", ("name", "state", "to install"), models))


def examine() -> dict[str, Any]:
    """Returns what `doctor` shows."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "core": {name: _version(name) for name in ("rc-agents", *CORE)},
        "extras": _extras(),
        "devices": _devices(),
        "models": {
            f"package:{name}": {
                "installed": all(_version(one.split("==")[0]) for one in model.requirements),
                "install": install_command(*model.requirements),
            }
            for name, model in MODELS.items()
        },
        "cache": str(cache_dir()),
    }


def _extras() -> dict[str, list[str]]:
    """Each extra with the packages that it misses."""
    found: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("rc-agents") or ():
        named = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", line)
        package = re.match(r"[\w.-]+", line)
        if named is None or package is None or named[1] in INNER:
            continue
        missing = found.setdefault(named[1], [])
        if _version(package[0]) is None:
            missing.append(package[0])
    return found


def _devices() -> dict[str, str]:
    found = {"cpu": f"{torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "shared with the processor"
    return found


def _install(extra: str, missing: list[str]) -> str:
    return f"pip install 'rc-agents[{extra}]'" if missing else ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))  # brackets are no markup
    return table
