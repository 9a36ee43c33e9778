"""lm-eval's own tasks, through its harness, for any method."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from rc_agents.benchmarks.scores import Score

from rc_agents.errors import ConfigError
from rc_agents.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class Harness:
    """The accuracies of lm-eval's tasks, item by item; needs the extra `eval`.

    Args:
        tasks: names in lm-eval, or in `rc_agents.adapters.lm_eval.LOCAL_TASKS`.
        count: of items a task, the first ones; None for all.
        num_fewshot: examples before each item; None as the task says.
    """

    tasks: tuple[str, ...]
    count: int | None = None
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("name at least one task of lm-eval, such as openbookqa_local")

    def texts(self, bench: Any) -> list[str]:
        """What the items ask."""
        return [text for name in self.tasks for text in _asked(name)[: self.count]]

    def run(self, bench: Any, scorer: Scorer) -> dict[str, Score]:
        """A share for each metric that says right or wrong of each item: `TASK/acc`, `TASK/acc_norm`, ..."""
        from rc_agents.adapters.lm_eval import ScorerLM, evaluate

        options = {"limit": self.count, "num_fewshot": self.num_fewshot, "bootstrap_iters": 0}
        found = evaluate(ScorerLM(scorer), self.tasks, **options)
        scores = {}
        for task, samples in found["samples"].items():
            for metric in found["higher_is_better"][task]:
                values = [float(one[metric]) for one in samples]
                if set(values) <= {0.0, 1.0}:
                    scores[f"{task}/{metric}"] = Score(values=values)
        return scores


@functools.cache
def _asked(name: str) -> list[str]:
    from rc_agents.adapters.lm_eval.report import find

    (task,) = find([name]).load([name])["tasks"].values()
    docs = task.test_docs() if task.has_test_docs() else task.validation_docs()
    return [str(task.doc_to_text(doc)) for doc in docs]
