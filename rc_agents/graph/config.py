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

from ..config import check_name, from_fields
from ..errors import ConfigError, nearest
from .settings import LatentConfig, NodeConfig, OutputConfig


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
