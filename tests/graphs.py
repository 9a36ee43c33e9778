"""Tiny graphs for tests, and the task that only two nodes together can solve."""

import random
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


LIKE = ("river", "town", "doctor", "water", "hill")
UNLIKE = ("year", "house", "school", "children", "morning")


def halves(count: int, seed: int) -> list[graphs.Asked]:
    """Questions of two halves, each read by one node alone; the answer is the exclusive or of what both say.

    No half is in two questions of one side, so none of another seed's training questions is known.
    """
    rng = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    found = []
    while len(found) < count:
        bits = divmod(len(found) % 4, 2)  # as many of each answer
        left, right = (_half(bit, rng) for bit in bits)
        if (left, right) not in seen:
            seen.add((left, right))
            texts = {"left": left, "right": right, "judge": "Are they alike?"}
            found.append(graphs.Asked.by_node(texts, 2, bits[0] ^ bits[1]))
    rng.shuffle(found)
    return found


def _half(bit: int, rng: random.Random) -> str:
    words = LIKE if bit else UNLIKE
    return "the " + " and the ".join(rng.choice(words) for _ in range(3))


XOR: dict[str, Any] = {
    "nodes": {
        "left": {"pooling": "mean"},
        "right": {"pooling": "mean"},
        "judge": {"hears": ["left", "right"], "at": 1},
    },
    "latent": {"width": 32},
    "output": {"width": 32, "choices": 2},
}
XOR_ARCHS = {
    "left": ("llama", None, None),
    "right": ("gpt2", None, None),
    "judge": ("qwen2", 6, 64),
}


def xor(config: Any = None, **options: Any) -> graphs.LatentGraph:
    """A graph for `halves`."""
    config = graphs.GraphConfig.of(config or XOR)
    tokenizer = tiny_tokenizer("prose")
    models = {
        name: tiny(arch, vocab_size=len(tokenizer), layers=layers, width=width)
        for name, (arch, layers, width) in XOR_ARCHS.items()
        if name in config.nodes
    }
    return graphs.build(config, models, tokenizers=dict.fromkeys(models, tokenizer), **options)
