"""`rc-agents info`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from rc_agents import CoupledForCausalLM, backbone
from rc_agents.errors import ConfigError

from .models import MODEL_HELP, Anchor, DeviceMap, DType, Specialists, open_model
from .plan import TOKENS, Devices, Quantize, planned, show


def info(
    model: Annotated[
        str | None, typer.Argument(help=f"{MODEL_HELP} Left out with --anchor.")
    ] = None,
    anchor: Anchor = None,
    specialist: Specialists = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    device_map: DeviceMap = None,
    dtype: DType = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Plan which model goes where; no weight is loaded."),
    ] = False,
    devices: Devices = None,
    quantization: Quantize = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="For --plan: the text that there is to be room for.")
    ] = TOKENS,
    rows: Annotated[int, typer.Option(min=1, help="For --plan: rows of a batch.")] = 1,
) -> None:
    """Show an ensemble: its models, where they meet, who reads whom and how loudly, parameters and memory.

    With --plan, where its models would go on this machine or another, and what would cross between devices.
    """
    if plan:
        made = planned(
            model, anchor, specialist, device_map, dtype, devices, quantization, tokens, rows
        )
        show(made, as_json)
        return
    for option, value in (("--devices", devices), ("--quantization", quantization)):
        if value is not None:
            raise ConfigError(f"{option} needs --plan")
    found = describe(open_model(model, anchor, specialist, device_map, dtype))
    if as_json:
        print(json.dumps(found))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in (_models(found), _edges(found)):
        console.print(table)
    total, trained = found["parameters"], found["trainable_parameters"]
    console.print(
        f"topology {found['topology']}, mix {found['mix']}, schedule {found['schedule']}\n"
        f"{total:,} parameters, {trained:,} of them in bridges; {_size(found['memory_bytes'])} of weights"
    )


def describe(model: CoupledForCausalLM) -> dict[str, Any]:
    """Returns what `info` shows; weights that models share count once in the totals."""
    config = model.config
    return {
        "models": [_model(model, name) for name in model.names],
        "topology": config.topology if isinstance(config.topology, str) else "custom",
        "bridge": config.bridge,
        "edge_bridges": config.edge_bridges,
        "mix": config.mix,
        "schedule": config.schedule,
        "sites": [dict(zip(model.names, row, strict=True)) for row in model.sites],
        "edges": [
            {"source": edge.source, "target": edge.target, "gates": _gates(model, edge)}
            for edge in model.edges
        ],
        "parameters": sum(one.numel() for one in _distinct(model.parameters())),
        "trainable_parameters": sum(one.numel() for _, one in model.trainable_parameters()),
        "memory_bytes": _bytes([*model.parameters(), *model.buffers()]),
    }


def _model(ensemble: CoupledForCausalLM, name: str) -> dict[str, Any]:
    model = ensemble.models[name]
    text = model.config.get_text_config(decoder=True)
    return {
        "name": name,
        "from": dict((ensemble.config.models or {}).get(name, {})),
        "type": model.config.model_type,
        "blocks": text.num_hidden_layers,
        "width": text.hidden_size,
        "vocabulary": getattr(text, "vocab_size", None),  # an encoder has none
        "tokens": (ensemble.config.alignment or {}).get(name, "own"),
        "parameters": sum(one.numel() for one in _distinct(model.parameters())),
        "memory_bytes": _bytes([*model.parameters(), *model.buffers()]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def _gates(model: CoupledForCausalLM, edge: Any) -> list[float]:
    """How far each site's gate is open before it reads a token: sigmoid of its value, 1 where it is fixed."""
    values = [
        getattr(model.bridge(edge, site).gate, "value", None) for site in range(len(model.sites))
    ]
    return [
        1.0 if value is None else round(torch.sigmoid(value.detach()).item(), 4) for value in values
    ]


def _distinct(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors, those that share their memory once."""
    seen = set()
    for tensor in tensors:
        first = next(backbone.held_parts(tensor))
        held = first.numel() and not first.is_meta  # an offloaded one has no place
        place = (tensor.device, first.data_ptr(), tensor.shape) if held else id(tensor)
        if place not in seen:
            seen.add(place)
            yield tensor


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    held = (part for tensor in tensors for part in backbone.held_parts(tensor))
    return sum(part.numel() * part.element_size() for part in _distinct(held))


def _models(found: dict[str, Any]) -> Table:
    table = Table(
        "model", "from", "type", "blocks", "width", "tokens", "parameters", "weights", "on"
    )
    for one in found["models"]:
        place = " + ".join(one["from"][key] for key in ("base", "adapter") if key in one["from"])
        cells = [one["name"], place or "memory", one["type"], one["blocks"], one["width"]]
        cells += [one["tokens"], f"{one['parameters']:,}", _size(one["memory_bytes"])]
        table.add_row(*map(str, cells), f"{one['dtype']}, {one['device']}")
    return table


def _edges(found: dict[str, Any]) -> Table:
    """A row an edge, a column a site: how far its gate is open."""
    sites = [f"block {next(iter(site.values()))}" for site in found["sites"]]
    table = Table("edge", *sites, title="open gates")
    for edge in found["edges"]:
        table.add_row(
            f"{edge['source']} -> {edge['target']}", *(f"{gate:.3f}" for gate in edge["gates"])
        )
    return table


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
