"""Tiny graphs for tests."""

from typing import Any

from rc_agents import graph as graphs
from tests.tiny import saved, tiny
from tests.tiny_tokenizers import tiny_tokenizer

TEXTS = [
    "What is the name of the river?",
    "Hi there",
    "Nothing in the world is as quiet as the house",
    "Some of them said",
]
ARCHS = {"a": "llama", "b": "gpt2", "c": "qwen2", "d": "gemma3_text"}
KINDS = {"a": "prose", "b": "metaspace", "c": "prose", "d": "code"}
PLAIN: dict[str, Any] = {
    "nodes": {
        "a": {"layer": 3},
        "b": {"pooling": "mean"},
        "c": {"hears": ["a", "b"], "at": 2},
        "d": {"hears": ["a", "b"], "at": 3},
    },
    "latent": {"width": 16},
    "output": {"width": 16},
}


def plain(**changed: Any) -> dict[str, Any]:
    """The plain config with parts of it changed; nodes by name."""
    nodes = {**PLAIN["nodes"], **changed.pop("nodes", {})}
    parts = {name: {**PLAIN[name], **changed.pop(name, {})} for name in ("latent", "output")}
    assert not changed
    return {"nodes": {name: node for name, node in nodes.items() if node is not None}, **parts}


def small(config: Any = None, **options: Any) -> graphs.LatentGraph:
    """A graph of tiny models that are passed in loaded."""
    config = graphs.GraphConfig.of(config or PLAIN)
    names = [name for name in config.nodes if name in ARCHS]
    tokenizers = {name: tiny_tokenizer(KINDS[name]) for name in names}
    models = {name: tiny(ARCHS[name], vocab_size=len(tokenizers[name])) for name in names}
    return graphs.build(config, models, tokenizers=tokenizers, **options)


def on_disk(folder: Any, config: Any = None, **options: Any) -> graphs.LatentGraph:
    """The same graph, its models loaded from a folder."""
    config = dict(config or PLAIN)
    nodes = {
        name: {**node, "model": str(saved(folder, ARCHS[name], KINDS[name]))}
        for name, node in config["nodes"].items()
    }
    return graphs.build({**config, "nodes": nodes}, **options)
