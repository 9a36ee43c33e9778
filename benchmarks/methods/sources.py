"""The coupled method when its bridges hear something else: is the gain the specialist's?"""

from dataclasses import replace

from rc_agents.benchmarks.methods.bench import Bench, Fitted, NotApplicable
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


def without_first(bench: Bench) -> Fitted:
    """The ensemble with its first specialist disabled: what the others say without it."""
    return _without(bench, 0)


def without_second(bench: Bench) -> Fitted:
    """The ensemble with its second specialist disabled."""
    return _without(bench, 1)


def _without(bench: Bench, place: int) -> Fitted:
    names = list(bench.setting.specialists)
    if len(names) < 2:
        raise NotApplicable("the setting has one specialist")
    fitted = coupled(bench)
    left = [name for name in names if name != names[place]]
    return replace(fitted, scorer=CausalScorer(fitted.model, specialists=left))
