"""The parts that a graph is made of, as data: a frozen node, the latent space, and what answers at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ModelRef, from_fields
from ..errors import ConfigError, nearest

WORDS: dict[str, tuple[str, ...]] = {
    "pooling": ("last", "mean", "attention"),
    "position": ("last", "all"),
    "aggregate": ("mean", "attention"),
    "link": ("latent", "direct"),
    "readout": ("choice", "head", "vocabulary"),
    "layout": ("lettered", "answered"),
}


def check_word(field_name: str, value: Any) -> None:
    """Raises `ConfigError` unless `value` is one of the words that a field allows."""
    if value not in WORDS[field_name]:
        raise ConfigError(
            f"unknown {field_name} {value!r}; {nearest(str(value), WORDS[field_name])}"
        )


def check_count(name: str, value: Any) -> None:
    """Raises `ConfigError` unless `value` is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is a whole number above 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """A frozen model in a graph, h its residual stream.

    Args:
        model: where it comes from; an empty reference for a model that is passed in loaded.
        hears: the nodes whose states reach it; none on level one.
        at: the 1-based block behind which it hears, or a share of its depth.
        position: where it hears: at its `last` token, or at `all`.
        strength: of what is injected; a start where it is learned.
        learn_strength: whether `strength` trains.
        layer: the 1-based block behind which it is read, or a share of its depth; behind `at`.
        pooling: what is read of it: the `last` token's state, the `mean` over tokens, or learned `attention` over all.

    Raises:
        ConfigError: an unknown word, or a number out of range.
    """

    model: ModelRef = field(default_factory=ModelRef)
    hears: tuple[str, ...] = ()
    at: int | float = 2 / 3
    position: str = "last"
    strength: float = 1.0
    learn_strength: bool = False
    layer: int | float = 1.0
    pooling: str = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _reference(self.model))
        heard = (self.hears,) if isinstance(self.hears, str) else tuple(self.hears)
        object.__setattr__(self, "hears", heard)
        check_word("pooling", self.pooling)
        check_word("position", self.position)
        for name in ("at", "layer"):
            _check_depth(name, getattr(self, name))
        if len(set(self.hears)) < len(self.hears):
            raise ConfigError(f"a node hears another twice: {', '.join(self.hears)}; name it once")

    def block(self, name: str, num_blocks: int) -> int:
        """Returns the 1-based block that `at` or `layer` stands for in a model of so many blocks.

        Raises:
            ConfigError: the model has no such block.
        """
        depth = getattr(self, name)
        block = depth if isinstance(depth, int) else max(1, round(depth * num_blocks))
        if not 1 <= block <= num_blocks:
            raise ConfigError(f"{name}={depth!r}: the model has blocks 1 to {num_blocks}")
        return block


def _reference(value: Any) -> ModelRef:
    if isinstance(value, ModelRef):
        return value
    if isinstance(value, Mapping):
        made: ModelRef = from_fields(ModelRef, dict(value))
        return made
    if isinstance(value, (str, Path)):
        return ModelRef(base=str(value))
    raise ConfigError(
        f"a node's model is an id, a path, 'package:NAME' or a ModelRef, got {type(value).__name__}"
    )


def _check_depth(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    share = isinstance(value, float) and 0 < value <= 1
    if not whole and not share:
        raise ConfigError(
            f"{name} is a block, counted from 1, or a share of the depth above 0 and up to 1.0, got {value!r}"
        )


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The space that all nodes write into and read from.

    Args:
        width: its dimension.
        normalize: bring what a node shows to RMS 1 before its projection, the aggregate to RMS 1 before it is injected,
            and what is injected to the RMS of the stream that hears it. False adds the plain projections.
        aggregate: `mean`, as published, or `attention`: weights by a learned query, so that projections can specialise.
        link: `latent`, or `direct`: bridges from node to node in its place, without a shared space (for comparison).
    """

    width: int = 256
    normalize: bool = True
    aggregate: str = "mean"
    link: str = "latent"

    def __post_init__(self) -> None:
        check_count("latent width", self.width)
        check_word("aggregate", self.aggregate)
        check_word("link", self.link)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What reads the last level and answers.

    Args:
        readout: `choice`: cross-attention with a learned query for each choice; `head`: a perceptron of one hidden
            layer on what the nodes show side by side (for comparison); or `vocabulary`: a last node speaks
            and hears the others by cross-attention at its own last block.
        choices: how many choices a question has at most.
        layout: how a question is read: `lettered`, all choices in one text and a query for each letter; or `answered`,
            one text a choice with that choice as its answer, and one query for all.
        width: of the cross-attention, or of the hidden layer.
        heads: of the cross-attention.
        reads: nodes that it reads; those that nobody hears where left out.
        voice: the node that speaks; the last one read where left out. For `vocabulary` alone.
    """

    readout: str = "choice"
    choices: int = 4
    layout: str = "lettered"
    width: int = 128
    heads: int = 4
    reads: tuple[str, ...] = ()
    voice: str | None = None

    def __post_init__(self) -> None:
        read = (self.reads,) if isinstance(self.reads, str) else tuple(self.reads)
        object.__setattr__(self, "reads", read)
        check_word("readout", self.readout)
        check_word("layout", self.layout)
        for name in ("choices", "width", "heads"):
            check_count(name, getattr(self, name))
        if self.width % self.heads and self.readout != "head":
            raise ConfigError(
                f"the output's width is a multiple of its heads, got {self.width} and {self.heads}"
            )
        if self.voice is not None and self.readout != "vocabulary":
            raise ConfigError(
                "voice has no meaning for readout='choice'; only 'vocabulary' has one"
            )

    @property
    def queries(self) -> int:
        """How many learned queries the readout has."""
        return self.choices if self.layout == "lettered" else 1
