"""One evaluation through lm-eval's harness."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from rc_agents.errors import InputError

from .report import LOCAL_TASKS, find


def evaluate(
    lm: LM, tasks: Sequence[str], *, include: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Runs tasks through lm-eval's harness.

    Args:
        lm: the model; `EnsembleLM`, `ScorerLM`, or any of lm-eval's.
        tasks: names, groups or patterns of lm-eval's tasks, and of `LOCAL_TASKS`.
        include: a folder with more tasks.
        options: of `lm_eval.simple_evaluate`: limit, num_fewshot, apply_chat_template, log_samples, ...

    Returns:
        What `simple_evaluate` returns: `results` by task, `configs`, `versions`, `n-samples`, `samples` where logged.

    Raises:
        InputError: no task, one that nothing is called, or one whose data cannot be had.
    """
    known = find(tasks, include)
    with quiet():
        try:
            found = simple_evaluate(model=lm, tasks=list(tasks), task_manager=known, **options)
        except OSError as error:  # what datasets and the hub raise where they find nothing
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"the data of {', '.join(tasks)} cannot be read: {reason}. Tasks that need no hub: "
                f"{', '.join(LOCAL_TASKS)}"
            ) from error
    assert found is not None  # only other ranks of a distributed run get nothing
    return dict(found)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences lm-eval's notes on how it was called."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
