"""Ensembles of one recipe that differ in who hears whom, how the outputs mix, and what a bridge is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rc_agents.benchmarks.methods.bench import Bench, Fitted, NotApplicable
from rc_agents.benchmarks.methods.bridging import fitted_bridges

from rc_agents import BridgeConfig


def unilateral(bench: Bench) -> Fitted:
    """The anchor hears the specialists; they hear nobody."""
    return _trained(bench, topology="unilateral")


def star_bilateral(bench: Bench) -> Fitted:
    """The anchor and each specialist hear one another."""
    return _trained(bench, topology="star_bilateral")


def multi_bilateral(bench: Bench) -> Fitted:
    """Everyone hears everyone."""
    return _trained(bench, topology="multi_bilateral")


def hybrid(bench: Bench) -> Fitted:
    """Everyone hears everyone, and the output is a learned mix of all models' logits."""
    _one_vocabulary(bench)
    return _trained(bench, topology="multi_bilateral", mix="learned")


def no_gate(bench: Bench) -> Fitted:
    """Bridges that are always open: their gates are the constant 1."""
    usual = BridgeConfig()
    bridge = replace(
        bench.recipe.bridge,
        gate="fixed",
        gate_init=usual.gate_init,
        gate_floor=usual.gate_floor,
        gate_reads=usual.gate_reads,
    )
    return _trained(bench, bridge=bridge)


def random_projections(bench: Bench) -> Fitted:
    """Bridges whose maps stay at their random start; only the gates learn."""
    return _trained(bench, bridge=replace(bench.recipe.bridge, kind="random", start="zero"))


def bottleneck(bench: Bench) -> Fitted:
    """Bridges through half of the source's width."""
    return _trained(bench, bridge=replace(bench.recipe.bridge, kind="bottleneck", start="zero"))


def moe(bench: Bench) -> Fitted:
    """No bridges: at every site a router mixes the hidden states of all models."""
    _one_vocabulary(bench)
    return _trained(bench, topology=None, bridge=BridgeConfig(kind="moe"))


def _trained(bench: Bench, **settings: Any) -> Fitted:
    if bench.recipe.edge_bridges:
        raise NotApplicable("the recipe's bridges are solved one after another, for its own edges")
    mix = settings.get("mix", bench.setting.mix)
    return fitted_bridges(
        bench,
        bench.couple(**settings),
        states=mix in (None, "anchor"),  # states replay the anchor's own output alone
        gates="bridge" not in settings,
    )


def _one_vocabulary(bench: Bench) -> None:
    if any(how == "span" for how in bench.frozen.config.alignment.values()):
        raise NotApplicable("the models' vocabularies differ, so their outputs cannot be mixed")
