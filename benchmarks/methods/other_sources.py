"""Bridges trained alike from models that know nothing more than the anchor: a random one, and the anchor itself."""

import torch
from rc_agents.benchmarks.methods.bench import Bench, Fitted
from rc_agents.benchmarks.methods.bridging import fitted_bridges
from transformers import AutoModelForCausalLM

import rc_agents


def random_weight_specialist(bench: Bench) -> Fitted:
    """Models of the specialists' architectures with random weights."""
    others = {}
    for place, name in enumerate(bench.frozen.specialists):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * bench.seed + place)
            model = AutoModelForCausalLM.from_config(
                bench.frozen.models[name].config, dtype=getattr(torch, bench.setting.dtype)
            )
        others[name] = model.to(bench.frozen.device)
    tokenizers = {name: bench.frozen.tokenizers[name] for name in others}
    return fitted_bridges(bench, bench.couple(others, tokenizers=tokenizers))


def self_bridge(bench: Bench) -> Fitted:
    """Copies of the anchor as specialists."""
    others = {name: rc_agents.ModelRef(base=bench.anchor_name) for name in bench.frozen.specialists}
    return fitted_bridges(bench, bench.couple(others))
