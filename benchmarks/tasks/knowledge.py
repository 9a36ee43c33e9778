"""Knowledge transfer as a task of the suites: the same questions and outcomes as `tasks.transfer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rc_agents.benchmarks.scores import Score
from rc_agents.benchmarks.tasks.transfer import choice, exact, strangers

from rc_agents.errors import ConfigError
from rc_agents.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Held-out facts of the setting's worlds.

    Args:
        strangers: whether subjects are asked about that nobody was taught.
    """

    strangers: bool = False

    def texts(self, bench: Any) -> list[str]:
        """The questions; a world's splits keep their subjects apart from those that train."""
        if not bench.worlds:
            raise ConfigError(f"the task 'knowledge' needs worlds, {bench.setting.name} has none")
        return [item.prompt for one in bench.exams for items in one.sets.values() for item in items]

    def run(self, bench: Any, scorer: Scorer) -> dict[str, Score]:
        """`exact` and `choice` by set of facts; `invented`, the share of strangers that get one of the answers."""
        found: dict[str, Score] = {}
        for one in bench.exams:
            for name, items in one.sets.items():
                for kind, outcome in (
                    ("exact", exact(scorer, items, one, bench.tokenizer)),
                    ("choice", choice(scorer, items, one.choices)),
                ):
                    bits = [float(bit) for bit in outcome["outcomes"]]
                    found[f"{one.world} {name}/{kind}"] = Score(values=bits)
            if self.strangers and one.strangers:
                bits = strangers(scorer, one, bench.reference)["invented"]
                values = [float(bit) for bit in bits]
                found[f"{one.world} strangers/invented"] = Score(values=values, better="lower")
        return found
