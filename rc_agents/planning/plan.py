"""The plan of an ensemble: where every model lies, what it takes there, what crosses between devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .. import placement
from ..alignment import Sites
from ..assembly import Reference
from ..config import BridgeConfig
from ..errors import ConfigError
from ..topology import ANCHOR, DEFAULT, Edge, Topology
from .machine import CPU, DISK, Machine, Place
from .sharing import Layers, compute_device, share, weights_on
from .sizing import Description, Sizing
from .traffic import Crossing, crossings, streamed

AUTO = "auto"
TOKENS = 2048
UNKNOWN_LINK = 1e-5
"""Seconds that a message counts for in choosing devices where the link is not described."""


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """One model's place.

    Args:
        name: the model.
        device_map: where it goes: one device, or part of the model -> device.
        weights: bytes of its weights by device.
        shares_with: the model whose base's weights these are, None where they are its own.
        cache_bytes_per_token: what each token takes in its cache; None where a skeleton does not tell.
        bridge_bytes: of the bridges into it.
        streamed_bytes: weights that every pass carries to the device from memory or disk.
    """

    name: str
    device_map: Place | Layers
    weights: dict[Place, int]
    shares_with: str | None
    cache_bytes_per_token: int | None
    bridge_bytes: int
    streamed_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where an ensemble goes.

    Args:
        models: in the ensemble's order.
        crossings: what goes from device to device per token.
        used: bytes by device: weights, bridges, and caches of `tokens` tokens.
        machine: the devices.
        tokens: length of the text that the caches are planned for; a model with a shorter context has less.
        rows: of the batch.
    """

    models: tuple[PlannedModel, ...]
    crossings: tuple[Crossing, ...]
    used: dict[Place, int]
    machine: Machine
    tokens: int
    rows: int

    @property
    def device_map(self) -> dict[str, Place | Layers]:
        """What `couple(device_map=...)` and `from_pretrained(device_map=...)` take."""
        return {model.name: model.device_map for model in self.models}

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data."""
        return {
            "device_map": self.device_map,
            "models": [asdict(model) for model in self.models],
            "crossings": [asdict(one) for one in self.crossings],
            "devices": {
                str(place): {"memory": size, "used": self.used.get(place, 0)}
                for place, size in self.machine.memory.items()
            },
            "tokens": self.tokens,
            "rows": self.rows,
        }


def plan(
    anchor: Reference | PreTrainedConfig,
    specialists: Mapping[str, Reference | PreTrainedConfig] | None = None,
    *,
    machine: Any = None,
    topology: str | Topology | Sequence[Sequence[str]] = DEFAULT,
    bridge: BridgeConfig | dict[str, Any] | str | None = None,
    sites: Sites = 5,
    dtype: Any = None,
    quantization: Any = None,
    device_map: Any = AUTO,
    tokens: int = TOKENS,
    rows: int = 1,
    trust_remote_code: bool = False,
) -> Plan:
    """Plans where an ensemble's models go, without loading a weight.

    Args:
        anchor: as in `rc_agents.couple`, or a model's configuration; or a saved ensemble by itself, which brings
            specialists, topology, bridges and sites.
        specialists: the same by name.
        machine: the devices: None for this machine, "2x80GiB", a mapping of devices to memory, a description with
            links, or a JSON file of one; see `Machine.of`.
        topology, bridge, sites, dtype, quantization: as in `rc_agents.couple`.
        device_map: "auto", or a dict by model name for models whose place is settled; "auto" for those it leaves out.
        tokens, rows: the text that there is to be room for, in tokens, and rows of a batch.
        trust_remote_code: lets Hugging Face run code that comes with a model.

    Raises:
        ConfigError: the models do not fit; the message says what is missing.
    """
    described = Description.of(anchor, specialists, topology, bridge, sites, dtype)
    sizing = Sizing(described, quantization, tokens, rows, trust_remote_code)
    settled = device_map if isinstance(device_map, dict) else {}
    if not isinstance(device_map, dict) and device_map not in (None, AUTO):
        settled = dict.fromkeys(described.references, device_map)
    return _plan(sizing, Machine.of(machine), settled, given=machine is not None)


def resolved(
    device_map: Any,
    anchor: Reference,
    specialists: Mapping[str, Reference],
    *,
    max_memory: Any = None,
    **form: Any,
) -> Any:
    """Returns a device map in which no model's place is "auto"; any other map as it is.

    Args:
        device_map: as in `rc_agents.couple`.
        anchor, specialists: the models.
        max_memory: the devices and what the ensemble may take of them; None for this machine's.
        form: more arguments of `plan`.

    Raises:
        ConfigError: `max_memory` without "auto", or the models do not fit.
    """
    names = [ANCHOR, *specialists]
    asked = {name: placement.device_map_of(name, device_map, names) for name in names}
    if AUTO not in [place for place in asked.values() if isinstance(place, str)]:
        if max_memory is not None:
            raise ConfigError(
                f"max_memory has no effect with device_map={device_map!r}; use device_map='auto', for all or by name"
            )
        return device_map
    settled = {name: place or CPU for name, place in asked.items() if place != AUTO}
    made = plan(anchor, specialists, machine=max_memory, device_map=settled, **form)
    return asked | {name: made.device_map[name] for name in names if asked[name] == AUTO}


def _plan(sizing: Sizing, machine: Machine, settled: Mapping[str, Any], *, given: bool) -> Plan:
    maps = {name: _layers(place) for name, place in settled.items() if place != AUTO}
    loaded = [n for n, r in sizing.references.items() if isinstance(r, PreTrainedModel)]
    maps |= {name: _present(sizing.references[name]) for name in loaded}
    free = dict(machine.memory)
    # What is loaded is gone already from what this machine says is free.
    for name in [name for name in maps if given or name not in loaded]:
        for place, count in _used(sizing, name, maps[name]).items():
            free[place] = free.get(place, 0) - count
    open_names = [name for name in sizing.sizes if name not in maps]
    cost = _cost(sizing, machine, maps)
    units = sizing.units(open_names)
    maps |= share(units, machine.homes, {p: max(0, n) for p, n in free.items()}, cost)
    maps = {name: maps[name] for name in sizing.sizes}
    used = _total(sizing, maps)
    if open_names:
        _check_fits(sizing, machine, free, _total(sizing, {n: maps[n] for n in open_names}))
    return Plan(
        models=tuple(_planned(sizing, name, maps) for name in maps),
        crossings=tuple(crossings(sizing.sizes, maps, sizing.edges, sizing.site_rows, machine)),
        used=used,
        machine=machine,
        tokens=sizing.tokens,
        rows=sizing.rows,
    )


def _layers(place: Any) -> Layers:
    return (
        {str(part): _named(one) for part, one in place.items()}
        if isinstance(place, dict)
        else {"": _named(place)}
    )


def _named(place: Any) -> Place:
    """A device as plans name it: CUDA's by its number, as Hugging Face does."""
    if isinstance(place, int):
        return place
    device = str(place)
    return int(device[5:]) if device.startswith("cuda:") else device


def _present(model: PreTrainedModel) -> Layers:
    """Where a loaded model's weights lie."""
    return {
        name: _named(one.device)
        for name, one in (*model.named_parameters(), *model.named_buffers())
    } | {"": _named(placement.input_device(model))}


def _used(sizing: Sizing, name: str, layers: Layers) -> dict[Place, int]:
    """Bytes that one model takes by device; what lives beside its weights lies with its blocks."""
    size = sizing.sizes[name]
    own = sizing.base_of(name) == name
    found = {place: int(count) for place, count in weights_on(size, layers).items() if own}
    blocks = Counter(compute_device(layers, block) for block in size.blocks)
    for place, count in blocks.items():
        found[place] = found.get(place, 0) + sizing.beside(name) * count // blocks.total()
    return found


def _total(sizing: Sizing, maps: Mapping[str, Layers]) -> dict[Place, int]:
    total: dict[Place, int] = {}
    for name, layers in maps.items():
        for place, count in _used(sizing, name, layers).items():
            total[place] = total.get(place, 0) + count
    return total


def _check_fits(
    sizing: Sizing, machine: Machine, free: Mapping[Place, int], used: Mapping[Place, int]
) -> None:
    """Raises where a device would hold more than it has."""
    over = [place for place, count in used.items() if count > free.get(place, 0)]
    if not over:
        return
    need, have = sum(used.values()), sum(max(0, count) for count in free.values())
    largest = max(sizing.sizes.values(), key=lambda size: size.weight_bytes)
    lacking = [place for place in (CPU, DISK) if place not in machine.memory]
    remedy = f"add {' and '.join(map(repr, lacking))} to the devices, " if lacking else ""
    raise ConfigError(
        f"the models do not fit: weights, bridges and caches of {sizing.tokens} tokens need {gigabytes(need)}, the "
        f"devices have {gigabytes(have)} free ({', '.join(f'{place}: {gigabytes(n)}' for place, n in free.items())}), "
        f"and {over[0]!r} would be over; the largest is {largest.name!r} with {gigabytes(largest.weight_bytes)}; "
        f"{remedy}quantize it, take a smaller dtype, or plan for fewer tokens"
    )


def gigabytes(count: float) -> str:
    """Returns a size as a person reads it."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _cost(sizing: Sizing, machine: Machine, settled: Mapping[str, Layers]) -> Any:
    """What an assignment of whole models spends on messages per token, in seconds; edges to the settled included."""
    fixed = {name: layers[""] for name, layers in settled.items() if "" in layers}

    def cost(homes: Mapping[str, Place]) -> float:
        places = fixed | dict(homes)
        return sum(_edge_seconds(sizing, machine, edge, places) for edge in sizing.edges)

    return cost


def _edge_seconds(
    sizing: Sizing, machine: Machine, edge: Edge, places: Mapping[str, Place]
) -> float:
    ends = [places.get(name) for name in edge]
    if None in ends or ends[0] == ends[1]:
        return 0.0
    link = machine.link(*ends)  # type: ignore[arg-type]
    each = UNKNOWN_LINK if link is None else link.seconds(sizing.sizes[edge.source].state_bytes)
    return each * len(sizing.site_rows)


def _planned(sizing: Sizing, name: str, maps: Mapping[str, Layers]) -> PlannedModel:
    size, layers = sizing.sizes[name], maps[name]
    base = sizing.base_of(name)
    weights = weights_on(size, layers)
    return PlannedModel(
        name=name,
        device_map=layers[""] if len(set(layers.values())) == 1 and "" in layers else layers,
        weights={place: int(count) for place, count in weights.items()},
        shares_with=None if base == name else base,
        cache_bytes_per_token=size.cache_bytes,
        bridge_bytes=sizing.bridge_bytes[name],
        streamed_bytes=streamed(size, layers),
    )
