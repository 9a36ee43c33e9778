"""The graphs and heads that `graphs` compares, and the frozen models that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rc_agents import graph as graphs
from rc_agents import packaged

BASE, GEMMA = "package:smollm2-135m", "package:gemma3-270m"
MODELS: dict[str, dict[str, str]] = {
    "general": {"base": BASE},
    "medical": {"base": BASE, "adapter": "package:medical-coding"},
    "python": {"base": BASE, "adapter": "package:python"},
    "gemma": {"base": GEMMA},
}
WIDTHS = {"general": 576, "medical": 576, "python": 576, "gemma": 640}
LEVEL_ONE = ("general", "medical", "python")
HEARS_AT = {"general": 20, "gemma": 12}  # two thirds of the blocks
LATENT, OUTPUT = 256, 128


@dataclass(frozen=True)
class Method:
    """A graph, and how it is trained.

    Args:
        config: the graph.
        ridge: whether it starts in closed form.
        shuffled: whether level one reads another question.
        random: whether level one's models have random weights.
        dissected: whether it is also asked without each node, with the first seed.
    """

    config: graphs.GraphConfig
    ridge: bool = False
    shuffled: bool = False
    random: bool = False
    dissected: bool = False


def graph_config(
    level_two: Sequence[str],
    choices: int,
    layout: str,
    *,
    aggregate: str = "mean",
    link: str = "latent",
) -> graphs.GraphConfig:
    """Returns the graph: all nodes are read at their last block, level two hears after two thirds of its blocks."""
    nodes = {name: graphs.NodeConfig(model=MODELS[name]) for name in LEVEL_ONE}
    for name in level_two:
        judge = "judge" if name == "general" else name
        nodes[judge] = graphs.NodeConfig(model=MODELS[name], hears=LEVEL_ONE, at=HEARS_AT[name])
    return graphs.GraphConfig(
        nodes=nodes,
        latent=graphs.LatentConfig(width=LATENT, aggregate=aggregate, link=link),
        output=graphs.OutputConfig(width=OUTPUT, choices=choices, layout=layout),
    )


def random_config(plain: graphs.GraphConfig) -> graphs.GraphConfig:
    """Returns the graph with a model of random weights in the place of level one's, read behind three blocks."""
    drawn = {
        name: graphs.NodeConfig(layer=layer)
        for name, layer in zip(LEVEL_ONE, (10, 15, 20), strict=True)
    }
    return replace(plain, nodes={**plain.nodes, **drawn})


def head_config(
    read: dict[str, int | float], parameters: int, choices: int, layout: str
) -> graphs.GraphConfig:
    """Returns a head with at least so many trained values on models read behind some block."""
    queries = graphs.OutputConfig(choices=choices, layout=layout).queries
    width = graphs.matched_width(parameters, sum(WIDTHS[name] for name in read), queries)
    return graphs.GraphConfig(
        nodes={
            name: graphs.NodeConfig(model=MODELS[name], layer=layer) for name, layer in read.items()
        },
        output=graphs.OutputConfig(readout="head", width=width, choices=choices, layout=layout),
    )


def methods(level_two: Sequence[str], choices: int, layout: str) -> dict[str, Method]:
    """Returns all trained methods by name."""
    plain = graph_config(level_two, choices, layout)
    matched = graphs.build(plain, dtype="float32").num_trainable()
    attention = graph_config(level_two, choices, layout, aggregate="attention")
    found = {
        "graph": Method(plain, dissected=True),
        "graph_attention": Method(attention),
        "graph_ridge": Method(plain, ridge=True),
        "bridges": Method(graph_config(level_two, choices, layout, link="direct")),
        "graph_shuffled": Method(plain, shuffled=True),
        "graph_random": Method(random_config(plain), random=True),
    }
    members = [*LEVEL_ONE, *(name for name in level_two if name not in LEVEL_ONE)]
    reads: dict[str, dict[str, int | float]] = {name: {name: 1.0} for name in members}
    reads |= {f"{name}_middle": {name: HEARS_AT[name]} for name in level_two}
    reads["all"] = dict.fromkeys(members, 1.0)
    for name, read in reads.items():
        found[f"head_{name}"] = Method(head_config(read, matched, choices, layout))
    return found


def build(method: Method, seed: int) -> graphs.LatentGraph:
    """Builds a method's graph."""
    if not method.random:
        return graphs.build(method.config, dtype="float32", seed=seed)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = packaged.resolve(BASE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(place)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return graphs.build(
        method.config,
        dict.fromkeys(LEVEL_ONE, model),
        tokenizers=dict.fromkeys(LEVEL_ONE, AutoTokenizer.from_pretrained(place)),
        seed=seed,
        dtype=dict.fromkeys((n for n in method.config.nodes if n not in LEVEL_ONE), "float32"),
    )
