"""Finding tasks before anything runs, and showing results after it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from rc_agents.errors import InputError

TASKS = Path(__file__).parent / "tasks"
LOCAL_TASKS = tuple(sorted(path.stem for path in TASKS.glob("*.yaml")))
"""Tasks over text from the package index or a local folder, asked as lm-eval's own tasks of that name ask."""
_WITHOUT_HUB = f"Tasks that need no hub: {', '.join(LOCAL_TASKS)}"


def find(tasks: Sequence[str], include: str | Path | None = None) -> TaskManager:
    """Returns lm-eval's index with the tasks asked for.

    Only the own tasks are indexed where that will do, as lm-eval's thousands take a while.

    Raises:
        InputError: no task, or one that nothing is called.
    """
    if not tasks:
        raise InputError(f"name at least one task. {_WITHOUT_HUB}")
    folders: list[str | Path] = [TASKS, *([Path(include)] if include else [])]
    own = TaskManager(include_path=folders, include_defaults=False)
    if all(own.match_tasks([name]) for name in tasks):
        return own
    known = TaskManager(include_path=folders)
    for name in tasks:
        if not known.match_tasks([name]):
            close = difflib.get_close_matches(name, known.all_tasks, 3)
            hint = f"; did you mean {' or '.join(close)}?" if close else "."
            raise InputError(f"lm-eval has no task {name!r}{hint} {_WITHOUT_HUB}")
    return known


def table(results: dict[str, Any]) -> str:
    """Returns the results as lm-eval prints them."""
    return str(make_table(results))


def to_json(results: dict[str, Any]) -> str:
    """Returns the results as JSON, without the samples."""
    kept = {key: value for key, value in results.items() if key != "samples"}
    return json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False)
