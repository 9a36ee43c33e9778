"""The coupled method when its bridges hear something else: is the gain the specialist's?"""

from dataclasses import replace

from rc_agents.benchmarks.methods.bench import Bench, Fitted
from rc_agents.benchmarks.methods.coupled import coupled

from rc_agents.scoring import AblatedScorer, CausalScorer


def zero_source(bench: Bench) -> Fitted:
    """Every bridge reads zeros; through a linear map without bias that is the frozen anchor."""
    fitted = coupled(bench)
    return replace(fitted, scorer=AblatedScorer(CausalScorer(fitted.model), "zero", bench.seed))


def shuffled_source(bench: Bench) -> Fitted:
    """Every bridge reads the states of another prompt."""
    fitted = coupled(bench)
    return replace(fitted, scorer=AblatedScorer(CausalScorer(fitted.model), "shuffled", bench.seed))
