"""What is to be placed, as data, and what each part of it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .. import backbone, placement
from ..alignment import site_rows
from ..assembly import as_ref, bare, member_names
from ..bridges import Bridge, Router
from ..config import BridgeConfig, CouplingConfig, ModelRef
from ..topology import ANCHOR, resolve
from .sharing import Unit
from .sizes import ModelSize, measure


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is to be placed, as data."""

    references: Mapping[str, Any]
    topology: Any
    bridge: BridgeConfig
    sites: Any
    dtype: Any
    rows: list[list[int]] | None = None

    @classmethod
    def of(
        cls, anchor: Any, specialists: Any, topology: Any, bridge: Any, sites: Any, dtype: Any
    ) -> Description:
        """Takes the arguments of `plan`, or what a saved ensemble says."""
        saved = _saved(anchor) if specialists is None else None
        if saved is None:
            return cls(
                references=dict(
                    zip(
                        member_names(specialists),
                        (anchor, *(specialists or {}).values()),
                        strict=True,
                    )
                ),
                topology=topology,
                bridge=BridgeConfig.of(bridge),
                sites=sites,
                dtype=dtype,
            )
        folder, config = saved
        return cls(
            references={
                name: (
                    ModelRef(**_inside(folder, (config.models or {})[name])),
                    (config.model_configs or {}).get(name),
                )
                for name in config.names or []
            },
            topology=config.topology,
            bridge=config.bridge_config,
            sites=None,
            dtype=dtype or config.dtypes,
            rows=config.site_layers,
        )


def _saved(anchor: Any) -> tuple[str, CouplingConfig] | None:
    """A saved ensemble's folder and config, None for anything else."""
    if isinstance(anchor, CouplingConfig):
        return "", anchor
    if not isinstance(anchor, (str, Path)):
        return None
    place = backbone.locate(str(anchor))
    try:
        settings, _ = PreTrainedConfig.get_config_dict(place)
    except (OSError, ValueError):
        return None  # measuring the model says what is wrong
    if settings.get("model_type") != CouplingConfig.model_type:
        return None
    own = {key: value for key, value in settings.items() if not key.startswith("bridges_")}
    return place, CouplingConfig.from_dict(own)


def _inside(folder: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    base = fields.get("base")
    inside = base is not None and not Path(base).is_absolute() and (Path(folder) / base).is_dir()
    return {**fields, "base": str(Path(folder) / str(base))} if inside else dict(fields)


class Sizing:
    """The sizes of an ensemble's models, and what lives beside them."""

    def __init__(
        self, ensemble: Description, quantization: Any, tokens: int, rows: int, remote: bool
    ) -> None:
        self.tokens, self.rows = tokens, rows
        names = list(ensemble.references)
        self.references: dict[str, Any] = {}
        self.sizes: dict[str, ModelSize] = {}
        for name, given in ensemble.references.items():
            reference, config = given if isinstance(given, tuple) else (given, None)
            if not isinstance(reference, (PreTrainedModel, PreTrainedConfig)):
                if config is None or reference.base is not None:
                    reference = as_ref(name, reference)
                reference = placement.quantization_of(name, reference, quantization, names)
            self.references[name] = reference
            dtype = placement.dtype_of(name, ensemble.dtype, names)
            twin = self._twin(name)
            self.sizes[name] = (
                measure(name, reference, dtype, remote, config)
                if twin is None
                else self.sizes[twin]
            )
        self.edges = () if ensemble.bridge.kind == "moe" else resolve(ensemble.topology, names)
        depths = {name: len(size.blocks) for name, size in self.sizes.items()}
        self.site_rows = ensemble.rows or site_rows(
            ensemble.sites,
            depths,
            still=[
                name
                for name, size in self.sizes.items()
                if backbone.is_encoder(size.skeleton.config)
            ],
        )
        self.bridge_bytes = dict.fromkeys(names, 0)
        self._count_bridges(ensemble.bridge)

    def _twin(self, name: str) -> str | None:
        """The model loaded before whose base's weights this one shares."""
        mine = self.references[name]
        if not isinstance(mine, ModelRef) or mine.adapter is None:
            return None
        for other in self.sizes:
            one = self.references[other]
            if isinstance(one, ModelRef) and one.adapter is None and one == bare(mine):
                return other
        return None

    def _count_bridges(self, form: BridgeConfig) -> None:
        widths = {name: size.width for name, size in self.sizes.items()}
        with torch.device("meta"):
            if form.kind == "moe":
                made: Any = Router(list(widths), widths[ANCHOR])
                self.bridge_bytes[ANCHOR] = _bytes(made) * len(self.site_rows)
            for edge in self.edges:
                pools = backbone.is_encoder(self.sizes[edge.source].skeleton.config)
                made = Bridge(form, widths[edge.source], widths[edge.target], pools=pools)
                self.bridge_bytes[edge.target] += _bytes(made) * len(self.site_rows)

    def cache(self, name: str) -> int:
        """Bytes of a model's cache for the text that there is to be room for."""
        size = self.sizes[name]
        tokens = min(self.tokens, size.context or self.tokens)
        return (size.cache_bytes or 0) * tokens * self.rows

    def beside(self, name: str) -> int:
        """Bytes that live where a model computes, apart from its weights."""
        return self.cache(name) + self.bridge_bytes[name]

    def units(self, names: Sequence[str]) -> list[Unit]:
        """The models that are to be placed, those over one base together."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.base_of(name), []).append(name)
        return [
            Unit(names=tuple(group), size=self.sizes[group[0]], beside=sum(map(self.beside, group)))
            for group in groups.values()
        ]

    def base_of(self, name: str) -> str:
        """The model whose base's weights this one holds, itself where they are its own."""
        return self.sizes[name].name


def _bytes(module: torch.nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in module.parameters())
