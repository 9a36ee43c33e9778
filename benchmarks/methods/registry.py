"""The methods by name."""

from rc_agents.benchmarks.methods import coupled, frozen, other_sources, sources
from rc_agents.benchmarks.methods.bench import Method

METHODS: dict[str, Method] = {
    "frozen_anchor": frozen.frozen_anchor,
    "specialist": frozen.specialist,
    "second_specialist": frozen.second_specialist,
    "adapter_on_anchor": frozen.adapter_on_anchor,
    "coupled": coupled.coupled,
    "zero_source": sources.zero_source,
    "shuffled_source": sources.shuffled_source,
    "random_weight_specialist": other_sources.random_weight_specialist,
    "self_bridge": other_sources.self_bridge,
}
