"""One specialist asks the next inside a pass: the chain's bridges are solved in the order in which they speak.

Gates see the bridges' chains and the retained text; no chain that is scored, and no middle term that is kept apart.
"""

from __future__ import annotations

from typing import Any

from rc_agents.benchmarks.methods.bench import Bench, Fitted
from rc_agents.benchmarks.methods.bridging import closed_form, gate_negatives
from rc_agents.benchmarks.tasks.items import documents

from rc_agents.training.solve_chain import solve_chain


def solved_hops(bench: Bench, model: Any) -> Fitted:
    """Solves the bridges first -> second at the first site and second -> anchor at the last one."""
    recipe = bench.recipe
    fits = solve_chain(
        model,
        bench.pairs(),
        gate_negatives(bench, bench.retained()),
        documents("train", recipe.start_documents),
        penalty=recipe.gates,
        quiet=recipe.quiet,
    )
    return closed_form(model, gates={key: vars(fit) for key, fit in fits.items()})
