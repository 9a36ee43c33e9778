"""Who gets which device: whole models first, then layers over several devices, then memory that is not the device's.

1. Every model whole on one device, so that all devices are as full as each other; among equals, where the ensemble's
   messages take least time.
2. Where some do not fit whole, the largest ones are split over the layers, as few as possible.
3. Where the devices do not hold all, every model gets the share of a device that its size has in what wants to live
   there; the rest of each lies in the processor's memory, and on disk what does not fit there either.

Which layer goes where inside a share is `accelerate.infer_auto_device_map`'s work.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import accelerate.utils.modeling
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory

from .machine import CPU, DISK, Place
from .sizes import ModelSize

BEAM = 512
"""Partial assignments that are kept: with so many, small ensembles are searched whole."""
Layers = dict[str, Place]
Cost = Callable[[Mapping[str, Place]], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """Models over one base, which lie together because they share its weights; mostly one model.

    Args:
        names: the models.
        size: of the base.
        beside: bytes that live where its layers compute: caches and incoming bridges.
    """

    names: tuple[str, ...]
    size: ModelSize
    beside: int

    @property
    def need(self) -> int:
        """Bytes of all."""
        return self.size.weight_bytes + self.beside


def share(
    units: Sequence[Unit], homes: Sequence[Place], free: Mapping[Place, int], cost: Cost
) -> dict[str, Layers]:
    """Returns where each model's layers go, by name.

    Args:
        units: what is to be placed.
        homes: the devices that models are meant to live on.
        free: bytes by device, "cpu" and "disk" among them.
        cost: seconds that an assignment of whole models spends on messages.
    """
    whole = _assign(units, homes, free, cost)
    if whole is not None:
        return _whole(whole)
    ordered = sorted(units, key=lambda unit: unit.need)
    for count in range(1, len(ordered) + 1 if len(homes) > 1 else 1):
        small, large = ordered[:-count], ordered[-count:]
        whole = _assign(small, homes, free, cost)
        split = None if whole is None else _split(large, homes, _left(small, whole, free))
        if whole is not None and split is not None:
            return _whole(whole) | split
    return _offload(ordered, homes, free)


def _whole(homes: Mapping[str, Place]) -> dict[str, Layers]:
    return {name: {"": home} for name, home in homes.items()}


def _left(
    units: Sequence[Unit], homes: Mapping[str, Place], free: Mapping[Place, int]
) -> dict[Place, int]:
    """What the units leave of every device."""
    left = dict(free)
    for unit in units:
        left[homes[unit.names[0]]] -= unit.need
    return left


def _assign(
    units: Sequence[Unit], homes: Sequence[Place], free: Mapping[Place, int], cost: Cost
) -> dict[str, Place] | None:
    """A device for each unit, None where they do not fit; the largest are placed first."""
    beam: list[dict[str, Place]] = [{}]
    placed: list[Unit] = []
    for unit in sorted(units, key=lambda unit: -unit.need):
        placed.append(unit)
        found: list[tuple[float, float, int, dict[str, Place]]] = []
        for start in beam:
            for home in homes:
                chosen = start | dict.fromkeys(unit.names, home)
                left = _left(placed, chosen, free)
                if all(left[one] >= 0 for one in homes):
                    found.append((_uneven(left, free, homes), cost(chosen), len(found), chosen))
        beam = [chosen for *_, chosen in sorted(found, key=lambda one: one[:3])[:BEAM]]
        if not beam:
            return None
    return beam[0]


def _uneven(left: Mapping[Place, int], free: Mapping[Place, int], homes: Sequence[Place]) -> float:
    """How unevenly the devices are filled: sum of used^2 / free over its least value, 1 where all are as full."""
    used = {home: free[home] - left[home] for home in homes}
    least = sum(used.values()) ** 2 / max(1, sum(free[home] for home in homes))
    return round(sum(used[home] ** 2 / max(1, free[home]) for home in homes) / max(1, least), 2)


def _split(
    units: Sequence[Unit], homes: Sequence[Place], left: dict[Place, int]
) -> dict[str, Layers] | None:
    """Layers of each unit over the devices, None where something is left over."""
    found: dict[str, Layers] = {}
    for unit in reversed(units):
        ordered = sorted(homes, key=lambda home: -left[home])
        share_of_weights = unit.size.weight_bytes / unit.need
        rooms = {index: int(left[home] * share_of_weights) for index, home in enumerate(ordered)}
        for memory in (_balanced(unit, rooms), rooms):
            layers = _infer(unit, memory)
            if set(layers.values()) <= set(rooms):
                break
        else:
            return None
        placed = {part: ordered[int(index)] for part, index in layers.items()}
        found |= dict.fromkeys(unit.names, placed)
        for home, count in weights_on(unit.size, placed).items():
            left[home] -= int(count / share_of_weights)
    return found


def _offload(
    units: Sequence[Unit], homes: Sequence[Place], free: Mapping[Place, int]
) -> dict[str, Layers]:
    """A fair share of one device for each unit, the rest of it in memory and on disk.

    A unit whose share holds not even a layer leaves it to the others and computes on the processor.
    """
    wanted: dict[Place, int] = dict.fromkeys(homes, 0)
    chosen: dict[Unit, Place] = {}
    for unit in reversed(units):
        home = min(homes, key=lambda one: (wanted[one] + unit.need) / max(free[one], 1))
        wanted[home] += unit.need
        chosen[unit] = home
    while True:
        found = _shares(chosen, free)
        homeless = [
            unit for unit, home in chosen.items() if home not in (CPU, home_of(found[unit]))
        ]
        if not homeless:
            return {name: found[unit] for unit in units for name in unit.names}
        chosen[min(homeless, key=lambda unit: unit.need)] = CPU


def _shares(chosen: Mapping[Unit, Place], free: Mapping[Place, int]) -> dict[Unit, Layers]:
    """Layers of each unit on its home, in memory and on disk."""
    wanted: dict[Place, int] = {}
    for unit, home in chosen.items():
        wanted[home] = wanted.get(home, 0) + unit.need
    rooms = {
        unit: 0 if home == CPU else min(unit.need, free[home] * unit.need // wanted[home])
        for unit, home in chosen.items()
    }
    claims = {unit: unit.need - room for unit, room in rooms.items()}  # of the processor's memory
    left, found = free.get(CPU, 0), {}
    for unit, home in chosen.items():
        others = sum(claims.values()) - claims[unit]
        fair = left * claims[unit] // max(1, others + claims[unit])
        in_memory = max(fair, left - others)
        del claims[unit]
        memory: dict[Place, int] = {CPU: in_memory}
        if home == CPU:
            memory[CPU] -= unit.beside
        else:
            memory[0] = rooms[unit] - unit.beside
        layers = _infer(unit, {place: max(0, room) for place, room in memory.items()})
        found[unit] = {name: home if place == 0 else place for name, place in layers.items()}
        left -= int(weights_on(unit.size, found[unit]).get(CPU, 0))
        left -= unit.beside if home == CPU else 0
    return found


def _infer(unit: Unit, memory: Mapping[Any, int]) -> dict[str, Any]:
    """Which part goes where, in the words of accelerate; "disk" where nothing else is left."""
    with _quiet():
        layers = infer_auto_device_map(
            unit.size.skeleton,
            max_memory=dict(memory),
            no_split_module_classes=_blocks(unit),
            special_dtypes=unit.size.narrow,
        )
    return dict(layers)


def _balanced(unit: Unit, rooms: Mapping[Any, int]) -> dict[Any, int]:
    """Less room on each device, so that the layers spread evenly."""
    with _quiet():
        return get_balanced_memory(
            unit.size.skeleton, dict(rooms), _blocks(unit), special_dtypes=unit.size.narrow
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps accelerate from saying that devices are not there, as they may be another machine's."""
    logger = logging.getLogger(accelerate.utils.modeling.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Current model requires .* bytes of buffer")
            yield
    finally:
        logger.setLevel(level)


def _blocks(unit: Unit) -> list[str]:
    """The classes whose modules stay whole: what the model says, and its blocks."""
    skeleton = unit.size.skeleton
    kinds = {type(skeleton.get_submodule(block)).__name__ for block in unit.size.blocks}
    return sorted(kinds | set(skeleton._no_split_modules or ()))


def place_of(layers: Mapping[str, Place], name: str) -> Place:
    """Returns where a module or tensor goes: what the longest matching part of the map says.

    What a user's map leaves out, such as buffers without weights, lies where the model computes.
    """
    fitting = [part for part in layers if not part or name == part or name.startswith(f"{part}.")]
    return layers[max(fitting, key=len)] if fitting else home_of(layers)


def weights_on(size: ModelSize, layers: Mapping[str, Place]) -> dict[Place, float]:
    """Returns the bytes of a model's weights by device."""
    found: dict[Place, float] = {}
    for name, count in size.tensors.items():
        place = place_of(layers, name)
        found[place] = found.get(place, 0) + count
    return found


def compute_device(layers: Mapping[str, Place], name: str) -> Place:
    """Returns where a module computes: what lies in memory or on disk is carried to the model's own device."""
    place = place_of(layers, name)
    return place if place not in (CPU, DISK) else home_of(layers)


def home_of(layers: Mapping[str, Place]) -> Place:
    """Returns the device that computes what lies in memory or on disk."""
    return next((place for place in layers.values() if place not in (CPU, DISK)), CPU)
