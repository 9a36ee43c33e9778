"""The methods by name, in the order of the report."""

from rc_agents.benchmarks.methods import (
    added_later,
    coupled,
    frozen,
    handoff,
    linear_adapter,
    logit_ensemble,
    lora,
    merged,
    other_sources,
    scalar_gate,
    sources,
    topologies,
)
from rc_agents.benchmarks.methods.bench import Method

from rc_agents.errors import PackageError

METHODS: dict[str, Method] = {
    "frozen_anchor": frozen.frozen_anchor,
    "specialist": frozen.specialist,
    "second_specialist": frozen.second_specialist,
    "third_specialist": frozen.third_specialist,
    "coupled": coupled.coupled,
    "added_later": added_later.added_later,
    "unilateral": topologies.unilateral,
    "star_bilateral": topologies.star_bilateral,
    "multi_bilateral": topologies.multi_bilateral,
    "hybrid": topologies.hybrid,
    "no_gate": topologies.no_gate,
    "random_projections": topologies.random_projections,
    "bottleneck": topologies.bottleneck,
    "moe": topologies.moe,
    "scalar_gate": scalar_gate.scalar_gate,
    "zero_source": sources.zero_source,
    "shuffled_source": sources.shuffled_source,
    "without_first": sources.without_first,
    "without_second": sources.without_second,
    "random_weight_specialist": other_sources.random_weight_specialist,
    "self_bridge": other_sources.self_bridge,
    "linear_adapter": linear_adapter.linear_adapter,
    "lora": lora.lora,
    "mean_logit_ensemble": logit_ensemble.mean_logit_ensemble,
    "logit_ensemble": logit_ensemble.logit_ensemble,
    "token_logit_ensemble": logit_ensemble.token_logit_ensemble,
    "adapter_on_anchor": frozen.adapter_on_anchor,
    "merged_adapters": merged.merged_adapters,
    "text_handoff": handoff.text_handoff,
}

AGENTS = (
    "agent_anchor",
    "agent_specialist",
    "agent_coupled",
    "agent_lora",
    "agent_handoff",
    "agent_three",
    "agent_routed",
    "agent_critique",
)
"""Methods that talk, in `methods.runnables`: they need langchain-core, which nothing else here does."""

NAMES = (*METHODS, *AGENTS)


def method(name: str) -> Method:
    """Returns a method by its name.

    Raises:
        PackageError: langchain-core is missing.
    """
    if name in METHODS:
        return METHODS[name]
    try:
        from rc_agents.benchmarks.methods import runnables
    except ModuleNotFoundError as error:
        raise PackageError(
            f"{name} needs {error.name}; run: pip install 'rc-agents[langchain]'"
        ) from error
    found: Method = getattr(runnables, name)
    return found
