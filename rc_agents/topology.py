"""Who reads whom: directed edges between named models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors import ConfigError, nearest

ANCHOR = "anchor"
DEFAULT = "multi_bilateral"


class Edge(NamedTuple):
    """One direction of coupling: `target` receives an update computed from `source`."""

    source: str
    target: str

    @property
    def key(self) -> str:
        """Name of the edge in module paths and checkpoints."""
        return f"{self.source}__{self.target}"


def _unilateral(names: Sequence[str]) -> list[Edge]:
    return [Edge(name, names[0]) for name in names[1:]]


def _star_bilateral(names: Sequence[str]) -> list[Edge]:
    return [edge for name in names[1:] for edge in (Edge(name, names[0]), Edge(names[0], name))]


def _multi_bilateral(names: Sequence[str]) -> list[Edge]:
    return [Edge(source, target) for target in names for source in names if source != target]


PRESETS: dict[str, Callable[[Sequence[str]], list[Edge]]] = {
    "unilateral": _unilateral,
    "star_bilateral": _star_bilateral,
    "multi_bilateral": _multi_bilateral,
}


@dataclass(frozen=True)
class Topology:
    """A list of directed edges, each an `Edge` or a `(source, target)` pair of model names.

    Raises:
        ConfigError: an edge is no pair of names, joins a model to itself, or comes twice.
    """

    edges: tuple[Edge, ...]

    def __init__(self, edges: Iterable[Edge | tuple[str, str] | Sequence[str]]) -> None:
        object.__setattr__(self, "edges", tuple(_edge(edge) for edge in edges))
        for edge in self.edges:
            if edge.source == edge.target:
                raise ConfigError(
                    f"edge {edge.source!r} -> {edge.target!r} joins a model to itself; "
                    "to bridge a model to a copy of itself, add it as a specialist under its own name"
                )
        twice = {edge for edge, count in Counter(self.edges).items() if count > 1}
        if twice:
            shown = ", ".join(f"{edge.source}->{edge.target}" for edge in sorted(twice))
            raise ConfigError(f"each edge may come once; these come more often: {shown}")

    @classmethod
    def unilateral(cls, names: Sequence[str]) -> Topology:
        """Every specialist into the anchor (`names[0]`), nothing back."""
        return cls(_unilateral(names))

    @classmethod
    def star_bilateral(cls, names: Sequence[str]) -> Topology:
        """The anchor and each specialist, both ways; none between specialists."""
        return cls(_star_bilateral(names))

    @classmethod
    def multi_bilateral(cls, names: Sequence[str]) -> Topology:
        """Every ordered pair of models: n (n - 1) edges."""
        return cls(_multi_bilateral(names))

    def check(self, names: Sequence[str]) -> None:
        """Raises `ConfigError` when an edge names a model that is not in `names`."""
        for name in (end for edge in self.edges for end in edge):
            if name not in names:
                raise ConfigError(
                    f"topology names an unknown model {name!r}; {nearest(name, names)}"
                )


def _edge(edge: Edge | tuple[str, str] | Sequence[str]) -> Edge:
    pair = isinstance(edge, Sequence) and not isinstance(edge, str) and len(edge) == 2
    if not pair or not all(isinstance(end, str) for end in edge):
        raise ConfigError(f"an edge is a pair of model names (source, target), got {edge!r}")
    return Edge(*edge)


def resolve(
    topology: str | Topology | Sequence[Sequence[str]], names: Sequence[str]
) -> tuple[Edge, ...]:
    """Turns a preset's name, a `Topology` or a plain edge list into edges between `names` (anchor first)."""
    if isinstance(topology, str):
        if topology not in PRESETS:
            raise ConfigError(f"unknown topology {topology!r}; {nearest(topology, PRESETS)}")
        return tuple(PRESETS[topology](names))
    try:
        chosen = topology if isinstance(topology, Topology) else Topology(topology)
    except TypeError:
        raise ConfigError(
            f"topology is a name ({', '.join(PRESETS)}) or a Topology, got {type(topology).__name__}"
        ) from None
    chosen.check(names)
    return chosen.edges
