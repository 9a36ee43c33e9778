"""What crosses which link while an ensemble runs: hidden states along edges, inside split models, and weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..topology import Edge
from .machine import CPU, DISK, Machine, Place
from .sharing import Layers, compute_device, home_of, place_of
from .sizes import ModelSize


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Hidden states from one device to another in one step of one token.

    Args:
        what: the edge, "source -> target", or the model's name inside a split model.
        source, target: the devices.
        messages: a step.
        num_bytes: of all messages, per token.
        seconds: of all messages one after another, None where the link's speed is not known.
    """

    what: str
    source: Place
    target: Place
    messages: int
    num_bytes: int
    seconds: float | None


def crossings(
    sizes: Mapping[str, ModelSize],
    maps: Mapping[str, Layers],
    edges: Sequence[Edge],
    rows: Sequence[Sequence[int]],
    machine: Machine,
) -> list[Crossing]:
    """Returns what crosses per token.

    Args:
        sizes, maps: by model.
        edges: who reads whom.
        rows: for each site the 1-based block of every model, in the order of `sizes`.
        machine: for the links' speeds.
    """
    homes = {
        name: [compute_device(maps[name], block) for block in size.blocks]
        for name, size in sizes.items()
    }
    columns = {name: column for column, name in enumerate(sizes)}
    found: dict[tuple[str, Place, Place], list[int]] = {}
    for edge in edges:
        for row in rows:
            ends = [homes[name][row[columns[name]] - 1] for name in edge]
            _count(found, f"{edge.source} -> {edge.target}", ends, sizes[edge.source].state_bytes)
    for name, size in sizes.items():
        for pair in itertools.pairwise(homes[name]):
            _count(found, name, pair, size.state_bytes)
    return [
        Crossing(
            what=what,
            source=source,
            target=target,
            messages=len(each),
            num_bytes=sum(each),
            seconds=_seconds(machine, source, target, each),
        )
        for (what, source, target), each in found.items()
    ]


def _count(
    found: dict[tuple[str, Place, Place], list[int]], what: str, ends: Sequence[Place], size: int
) -> None:
    source, target = ends
    if source != target:
        found.setdefault((what, source, target), []).append(size)


def _seconds(machine: Machine, one: Place, other: Place, messages: Sequence[int]) -> float | None:
    link = machine.link(one, other)
    return None if link is None else sum(map(link.seconds, messages))


def streamed(size: ModelSize, layers: Mapping[str, Place]) -> int:
    """Returns the bytes of weights that are carried to the model's device in every pass."""
    home = home_of(layers)
    away = (place_of(layers, name) for name in size.tensors)
    pairs = zip(size.tensors.values(), away, strict=True)
    return int(sum(count for count, place in pairs if place in (CPU, DISK) and place != home))
