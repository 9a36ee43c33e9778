"""What the links benchmark compares: pairs of models, links between them, and ways of coupling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rc_agents.benchmarks import cost_model

import rc_agents

WIDTH = 576


@dataclass(frozen=True)
class Pair:
    """A model and its twin.

    Attributes:
        name: of the pair.
        blocks: of each.
        head: share of the anchor's time for one token behind its last block, by parameters.
        repeats: rounds of a cell.
    """

    name: str
    blocks: int
    head: float
    repeats: int

    def models(self) -> tuple[Any, Any]:
        """What `couple` takes."""
        if self.name == "smollm2-135m":
            return "package:smollm2-135m", "package:smollm2-135m"
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=512,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=self.blocks,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)


PAIRS = (Pair("tiny", 10, 0.03, 6), Pair("smollm2-135m", 30, 0.21, 4))
WIRES = ("exact", "bfloat16", "int8")


@dataclass(frozen=True)
class Profile:
    """A link between anchor and specialist.

    Attributes:
        name: of it.
        latency: seconds one way.
        up: bits a second from the specialist.
        down: bits a second to the specialist.
    """

    name: str
    latency: float
    up: float
    down: float


PROFILES = (
    Profile("lan", 0.0002, 1e9, 1e9),
    Profile("wan", 0.02, 100e6, 100e6),
    Profile("edge", 0.03, 10e6, 50e6),
)


@dataclass(frozen=True)
class Form:
    """How anchor and twin are coupled.

    Attributes:
        name: of it.
        topology: preset.
        sites: of the anchor and of the twin, in tenths of their blocks.
        wires: that are tried.
    """

    name: str
    topology: str
    sites: tuple[tuple[int, int], ...]
    wires: tuple[str, ...] = ("exact",)

    def plan(
        self, pair: Pair, seconds: float, kind: str, tokens: int, wire: str
    ) -> cost_model.Plan:
        """The cost model's plan, both models taking so many seconds by themselves."""
        own, twin = zip(*self.sites, strict=True)
        head = pair.head if kind == "decode" else 0.0  # of a prompt, one token's logits are made
        up, down = ("twin", "anchor"), ("anchor", "twin")
        return cost_model.Plan(
            compute={
                "anchor": cost_model.spread(seconds, [tenth / 10 for tenth in own], head),
                "twin": cost_model.spread(seconds, [tenth / 10 for tenth in twin], head),
            },
            edges=[up] if self.topology == "unilateral" else [up, down],
            widths={"anchor": WIDTH, "twin": WIDTH},
            tokens=tokens,
            wire=wire,
            deaf=twin[-1] == 10,
        )

    def save(self, pair: Pair, folder: str) -> None:
        """Saves the ensemble, with bridges that are heard."""
        each = pair.blocks // 10
        sites = [{"anchor": each * own, "twin": each * twin} for own, twin in self.sites]
        anchor, twin = pair.models()
        settings = {"topology": self.topology, "sites": sites, "dtype": "float32"}
        model = rc_agents.couple(anchor, {"twin": twin}, alignment="shared", **settings)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, parameter in model.trainable_parameters():
                scale = 0.02 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.save_pretrained(folder, include_bases=pair.name == "tiny")


FIVE = tuple((tenth, tenth) for tenth in (2, 4, 6, 8, 10))
FORMS = (
    Form("unilateral 5", "unilateral", FIVE, WIRES),
    Form("star 5", "star_bilateral", FIVE, WIRES),
    Form("unilateral 1", "unilateral", ((10, 10),)),
    Form("star 1", "star_bilateral", ((10, 10),)),
    Form("unilateral 1, twin ahead", "unilateral", ((10, 3),)),
)
