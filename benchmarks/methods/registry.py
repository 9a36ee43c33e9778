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
)
from rc_agents.benchmarks.methods.bench import Method

METHODS: dict[str, Method] = {
    "frozen_anchor": frozen.frozen_anchor,
    "specialist": frozen.specialist,
    "second_specialist": frozen.second_specialist,
    "coupled": coupled.coupled,
    "added_later": added_later.added_later,
    "scalar_gate": scalar_gate.scalar_gate,
    "zero_source": sources.zero_source,
    "shuffled_source": sources.shuffled_source,
    "without_first": sources.without_first,
    "without_second": sources.without_second,
    "random_weight_specialist": other_sources.random_weight_specialist,
    "self_bridge": other_sources.self_bridge,
    "linear_adapter": linear_adapter.linear_adapter,
    "lora": lora.lora,
    "logit_ensemble": logit_ensemble.logit_ensemble,
    "token_logit_ensemble": logit_ensemble.token_logit_ensemble,
    "adapter_on_anchor": frozen.adapter_on_anchor,
    "merged_adapters": merged.merged_adapters,
    "text_handoff": handoff.text_handoff,
}
