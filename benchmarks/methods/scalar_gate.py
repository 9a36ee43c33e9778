"""The ensemble with the published gate: one number a bridge, the same for every token."""

from dataclasses import replace

from rc_agents.benchmarks.methods.bench import Bench, Fitted, NotApplicable
from rc_agents.benchmarks.methods.bridging import fitted_bridges


def scalar_gate(bench: Bench) -> Fitted:
    """The recipe's bridges, but no gate reads anything: there is nothing to solve for, so they are trained."""
    if bench.recipe.bridge.gate != "token":
        raise NotApplicable("the recipe's gates read nothing anyway")
    bridge = replace(bench.recipe.bridge, gate="scalar", gate_floor=0.0)
    return fitted_bridges(bench, bench.couple(bridge=bridge), gates=False)
