"""What a graph is made of, as data: frozen nodes, who hears whom, the latent space, and what answers at the end.

A graph has no cycle; a node's level is one more than the highest level of those it hears, and a node that hears nobody
is on level one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ModelRef, check_name, from_fields
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


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """A directed acyclic graph of frozen models.

    Args:
        nodes: by name.
        latent: the shared space.
        output: what answers.

    Raises:
        ConfigError: no node, an unknown name, a cycle, or a node that reaches no output.
    """

    nodes: Mapping[str, NodeConfig]
    latent: LatentConfig = field(default_factory=LatentConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ConfigError("a graph has at least one node, got none")
        built = {check_name(name): _built(NodeConfig, node) for name, node in self.nodes.items()}
        object.__setattr__(self, "nodes", built)
        object.__setattr__(self, "latent", _built(LatentConfig, self.latent))
        object.__setattr__(self, "output", _built(OutputConfig, self.output))
        for name, node in self.nodes.items():
            self._check_known(f"node {name!r} hears", node.hears)
        self._check_known("the output reads", self.output.reads)
        self._check_known("the output's voice is", [self.output.voice] if self.output.voice else [])
        self._check_reached(self.levels)
        if self.output.voice is not None and self.output.voice not in self.read:
            raise ConfigError(
                f"the output's voice {self.output.voice!r} is not among the nodes it reads: {', '.join(self.read)}"
            )

    def _check_known(self, what: str, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.nodes:
                raise ConfigError(f"{what} an unknown node {name!r}; {nearest(name, self.nodes)}")

    def _check_reached(self, levels: Sequence[Sequence[str]]) -> None:
        heard = set(self.read)
        for level in reversed(levels):
            for name in level:
                if name not in heard:
                    raise ConfigError(
                        f"node {name!r} reaches no output: nobody hears it, and the output does not read it"
                    )
                heard.update(self.nodes[name].hears)

    @property
    def levels(self) -> list[list[str]]:
        """The nodes by level, in the order of their names' declaration."""
        placed: dict[str, int] = {}
        while len(placed) < len(self.nodes):
            ready = {
                name: 1 + max((placed[one] for one in node.hears), default=0)
                for name, node in self.nodes.items()
                if name not in placed and all(one in placed for one in node.hears)
            }
            if not ready:
                left = ", ".join(name for name in self.nodes if name not in placed)
                raise ConfigError(f"a graph has no cycle, and these nodes hear one another: {left}")
            placed |= ready
        levels: list[list[str]] = [[] for _ in range(max(placed.values()))]
        for name in self.nodes:
            levels[placed[name] - 1].append(name)
        return levels

    @property
    def read(self) -> tuple[str, ...]:
        """The nodes that the output reads."""
        if self.output.reads:
            return self.output.reads
        heard = {one for node in self.nodes.values() for one in node.hears}
        return tuple(name for name in self.nodes if name not in heard)

    @property
    def voice(self) -> str | None:
        """The node that speaks; None where the output only chooses."""
        if self.output.readout != "vocabulary":
            return None
        return self.output.voice or self.read[-1]

    @property
    def heard(self) -> tuple[str, ...]:
        """The nodes that some node hears."""
        named = {one for node in self.nodes.values() for one in node.hears}
        return tuple(name for name in self.nodes if name in named)

    @property
    def hearing(self) -> tuple[str, ...]:
        """The nodes that hear some node."""
        return tuple(name for name, node in self.nodes.items() if node.hears)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, without what nobody set of the models' references."""
        data = {
            "nodes": {name: dataclasses.asdict(node) for name, node in self.nodes.items()},
            "latent": dataclasses.asdict(self.latent),
            "output": dataclasses.asdict(self.output),
        }
        for name, node in self.nodes.items():
            data["nodes"][name] |= {"model": node.model.to_dict(), "hears": list(node.hears)}
        data["output"]["reads"] = list(self.output.reads)
        return data

    @classmethod
    def of(cls, value: GraphConfig | Mapping[str, Any] | str | Path) -> GraphConfig:
        """Returns a config: as it is, from plain data, or from a file of YAML or JSON.

        Raises:
            ConfigError: a file that is not there or cannot be read, or unknown fields.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            made: GraphConfig = from_fields(cls, dict(value))
            return made
        if isinstance(value, (str, Path)):
            return cls.of(_parsed(Path(value).expanduser()))
        raise ConfigError(
            f"a graph is a GraphConfig, a mapping or a file, got {type(value).__name__}"
        )


def _built(kind: type, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        return from_fields(kind, dict(value))
    raise ConfigError(
        f"{kind.__name__} is built from a mapping, got {type(value).__name__}: {value!r}"
    )


def _parsed(path: Path) -> Mapping[str, Any]:
    import yaml  # comes with transformers and accelerate

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no graph can be read from {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} holds no mapping with nodes, but {type(found).__name__}")
    return found
