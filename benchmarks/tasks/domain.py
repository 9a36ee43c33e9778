"""The domain's own text: documents that neither the specialist nor any method has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rc_agents.benchmarks.scores import Score
from rc_agents.benchmarks.tasks.text import text_scores

from rc_agents.errors import ConfigError
from rc_agents.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class DomainText:
    """Perplexity, bits per byte and continuation of the setting's test documents."""

    def texts(self, bench: Any) -> list[str]:
        """The test documents."""
        if bench.domain is None:
            raise ConfigError(f"the task 'text' needs a domain, and {bench.setting.name} has none")
        found: list[str] = bench.domain.documents("test")
        return found

    def run(self, bench: Any, scorer: Scorer) -> dict[str, Score]:
        """As the protocol says."""
        return text_scores(scorer, self.texts(bench), bench.domain)
