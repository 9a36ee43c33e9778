"""The tasks of the suites by name; each is a frozen dataclass whose fields are its options in a suite's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rc_agents.benchmarks.declared import build
from rc_agents.benchmarks.scores import Score
from rc_agents.benchmarks.tasks.agents import Agents
from rc_agents.benchmarks.tasks.choice import Choice
from rc_agents.benchmarks.tasks.domain import DomainText
from rc_agents.benchmarks.tasks.forgetting import Forgetting
from rc_agents.benchmarks.tasks.harness import Harness
from rc_agents.benchmarks.tasks.knowledge import Knowledge
from rc_agents.benchmarks.tasks.latency import Latency
from rc_agents.benchmarks.tasks.memory import Memory

from rc_agents.errors import ConfigError, nearest
from rc_agents.scoring import Scorer


class Task(Protocol):
    """What is measured of a method."""

    def texts(self, bench: Any) -> list[str]:
        """Returns everything that is scored, which nothing may have trained on."""

    def run(self, bench: Any, scorer: Scorer) -> dict[str, Score]:
        """Returns the method's scores by name. It never asks which method it is."""


TASKS: dict[str, type[Any]] = {
    "text": DomainText,
    "forgetting": Forgetting,
    "knowledge": Knowledge,
    "choice": Choice,
    "agents": Agents,
    "harness": Harness,
    "latency": Latency,
    "memory": Memory,
}


def task(name: str, options: Mapping[str, Any] | None, where: str) -> Task:
    """Returns a task with its options.

    Args:
        name: in `TASKS`, with an own name behind a colon where a setting has it twice, such as `choice:health`.
        options: fields of its dataclass.
        where: what to call it in an error.

    Raises:
        ConfigError: no such task, or options that it does not have.
    """
    kind = name.split(":")[0]
    if kind not in TASKS:
        raise ConfigError(f"{where}: no task is called {kind!r}; {nearest(kind, list(TASKS))}")
    made: Task = build(TASKS[kind], options or {}, f"{where}.{name}")
    return made
