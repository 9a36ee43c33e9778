"""Weight merging: the specialists' updates, added to the anchor with equal shares."""

from __future__ import annotations

from typing import Any

from rc_agents.benchmarks.methods.bench import Bench, Fitted, NotApplicable

from rc_agents.scoring import CausalScorer

ALONE = 0.5  # share of a lonely adapter: half-way between the anchor and the specialist


def merged_adapters(bench: Bench) -> Fitted:
    """The mean of the specialists' weights; of one specialist, half of its update."""
    names = bench.frozen.specialists
    share = 1 / len(names) if len(names) > 1 else ALONE
    model = bench.anchor_copy()
    own = {name: value.shape for name, value in model.named_parameters()}
    for name in names:
        theirs = {key: value.shape for key, value in weights(bench.frozen.models[name]).items()}
        if theirs != {key: own.get(key) for key in theirs}:
            raise NotApplicable("weights of different shapes cannot be merged")
    merge(model, [bench.frozen.models[name] for name in names], share)
    return Fitted(scorer=CausalScorer(model, bench.tokenizer), notes={"share": share})


def merge(anchor: Any, specialists: list[Any], share: float) -> None:
    """Adds `share` times each specialist's difference from the anchor to the anchor's weights, in place."""
    own = dict(anchor.named_parameters())
    base = {name: value.detach().clone() for name, value in own.items()}
    for other in specialists:
        for name, weight in weights(other).items():
            own[name].data += share * (weight.to(base[name]) - base[name])


def weights(specialist: Any) -> dict[str, Any]:
    """Returns a specialist's weights by their names in the base, its adapter added in."""
    found = {}
    for name, value in specialist.named_parameters():
        if "lora_" not in name:
            found[name.replace(".base_layer.", ".")] = value.detach()
    for name, module in specialist.named_modules():
        if hasattr(module, "get_delta_weight"):
            place = f"{name}.weight"
            for adapter in module.active_adapters:
                found[place] = found[place] + module.get_delta_weight(adapter).to(found[place])
    return found
