"""What a machine offers: its devices' memory, and the links between them. It may be another one than this."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..errors import ConfigError, nearest

Place = int | str
CPU, DISK = "cpu", "disk"
SHARE = 0.9
"""Of the memory that is free on this machine: the rest is for activations."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """How fast two devices speak, either way.

    Args:
        ends: the two devices.
        gb_per_s: bandwidth in 10^9 bytes a second.
        latency_us: what every message costs before its first byte, in microseconds.
    """

    ends: frozenset[Place]
    gb_per_s: float
    latency_us: float = 0.0

    def seconds(self, num_bytes: float) -> float:
        """Returns how long one message takes."""
        return self.latency_us * 1e-6 + num_bytes / (self.gb_per_s * 1e9)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices with their memory in bytes, "cpu" and "disk" among them, and links.

    Args:
        memory: device -> bytes that the ensemble may take there; accelerators by their number or name.
        links: those whose speed is known.
    """

    memory: Mapping[Place, int]
    links: tuple[Link, ...] = ()

    @property
    def homes(self) -> list[Place]:
        """The devices that models are meant to live on: the accelerators, or the processor where there is none."""
        return [place for place in self.memory if place not in (CPU, DISK)] or [CPU]

    def link(self, one: Place, other: Place) -> Link | None:
        """Returns the link between two devices, None where nothing is known about it."""
        ends = frozenset((one, other))
        return next((link for link in self.links if link.ends == ends), None)

    @classmethod
    def here(cls) -> Machine:
        """Returns this machine: nine tenths of what is free on every device."""
        free: dict[Place, float] = {
            index: torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())
        }
        free |= {CPU: psutil.virtual_memory().available, DISK: shutil.disk_usage(".").free}
        return cls(memory={place: int(SHARE * size) for place, size in free.items()})

    @classmethod
    def of(cls, value: Machine | Mapping[Any, Any] | str | Path | None) -> Machine:
        """Returns a machine from its description.

        Args:
            value: None for this machine; "2x80GiB" or "2x80GiB,cpu=200GiB,disk=1TB"; a JSON file; or a mapping, either
                {device: memory} or {"devices": {device: memory}, "links": [{"between": [0, 1], "gb_per_s": 300,
                "latency_us": 5}]}.

        Raises:
            ConfigError: what cannot be read, an unknown key, or a link to a device that is not there.
        """
        if value is None:
            return cls.here()
        if isinstance(value, cls):
            return value
        if isinstance(value, (str, Path)):
            value = _file(Path(value)) if Path(value).suffix == ".json" else _short(str(value))
        if not isinstance(value, Mapping):
            raise ConfigError(f"devices are a mapping or text such as '2x80GiB', got {value!r}")
        if "devices" not in value:
            value = {"devices": value}
        _check_keys("devices", value, ("devices", "links"))
        memory = {_place(place): _bytes(place, size) for place, size in value["devices"].items()}
        if not memory:
            raise ConfigError("devices are empty; name at least one, for example 'cpu=16GiB'")
        return cls(memory=memory, links=tuple(_link(one, memory) for one in value.get("links", ())))


def _file(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"devices cannot be read from {path}: {error}") from error


def _short(text: str) -> dict[Place, str]:
    """Reads `2x80GiB,cpu=200GiB`."""
    found: dict[Place, str] = {}
    for part in text.split(","):
        many = re.fullmatch(r"\s*(\d+)\s*x\s*(\S+)\s*", part)
        name, equals, size = part.partition("=")
        if many:
            first = sum(isinstance(place, int) for place in found)
            found |= {first + index: many[2] for index in range(int(many[1]))}
        elif equals:
            found[_place(name.strip())] = size.strip()
        else:
            raise ConfigError(
                f"devices {text!r}: expected parts such as '2x80GiB' or 'cpu=200GiB', got {part!r}"
            )
    return found


def _place(name: Any) -> Place:
    return int(name) if isinstance(name, int) or str(name).isdecimal() else str(name)


def _bytes(place: Any, size: Any) -> int:
    """Reads bytes, "80GiB" or "500 MB"."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*", str(size))
    if found is None:
        raise ConfigError(
            f"memory of device {place!r} is {size!r}; expected bytes, or text such as '80GiB' or '500MB'"
        )
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def _link(value: Any, memory: Mapping[Place, int]) -> Link:
    if not isinstance(value, Mapping) or not {"between", "gb_per_s"} <= value.keys():
        raise ConfigError(
            f"a link is {{'between': [device, device], 'gb_per_s': number, 'latency_us': number}}, got {value!r}"
        )
    _check_keys("a link", value, ("between", "gb_per_s", "latency_us"))
    ends = frozenset(map(_place, value["between"]))
    for end in ends:
        if end not in memory:
            raise ConfigError(
                f"a link names an unknown device {end!r}; {nearest(str(end), map(str, memory))}"
            )
    speed, latency = value["gb_per_s"], value.get("latency_us", 0)
    numbers = all(isinstance(one, (int, float)) for one in (speed, latency))
    if len(ends) != 2 or not numbers or speed <= 0 or latency < 0:
        raise ConfigError(
            f"a link joins two devices at a speed above 0 and a latency of at least 0, got {dict(value)}"
        )
    return Link(ends=ends, gb_per_s=speed, latency_us=latency)


def _check_keys(what: str, value: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in value:
        if key not in known:
            raise ConfigError(f"{what}: unknown key {key!r}; {nearest(str(key), known)}")
