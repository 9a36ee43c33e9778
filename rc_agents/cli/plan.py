"""`rc-agents info --plan`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import rc_agents
from rc_agents.errors import ConfigError
from rc_agents.planning.plan import TOKENS, Plan, PlannedModel, gigabytes

from .models import by_name, place, specialist

__all__ = ["TOKENS", "Devices", "Quantize", "planned", "show"]

Devices = Annotated[
    str | None,
    typer.Option(
        metavar="2x80GiB|FILE.json",
        help="For --plan: another machine, as 2x80GiB,cpu=200GiB,disk=1TB or a JSON file with links.",
    ),
]
Quantize = Annotated[
    str | None, typer.Option(help="For --plan: int8, or of each model: anchor=int8,medical=int8.")
]


def planned(
    model: str | None,
    anchor: str | None,
    specialists: list[str] | None,
    device_map: str | None,
    dtype: str | None,
    devices: str | None,
    quantization: str | None,
    tokens: int,
    rows: int,
) -> Plan:
    """Plans what a command line names; see `rc_agents.plan`."""
    if (model is None) == (anchor is None):
        raise ConfigError("--plan takes a MODEL or an --anchor with its specialists")
    if specialists and anchor is None:
        raise ConfigError("--specialist needs --anchor; a saved ensemble has its own")
    chosen = dict(specialist(one) for one in specialists or [])
    return rc_agents.plan(
        anchor or str(model),
        chosen if anchor is not None else None,
        machine=devices,
        device_map=by_name(device_map, place),
        dtype=by_name(dtype, str),
        quantization=by_name(quantization, str),
        tokens=tokens,
        rows=rows,
    )


def show(plan: Plan, as_json: bool) -> None:
    """Prints a plan."""
    if as_json:
        print(json.dumps(plan.to_dict()))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in (_models(plan), _devices(plan), _crossings(plan)):
        if table.row_count:
            console.print(table)
    console.print(
        f"planned for {plan.tokens} tokens in {plan.rows} row(s); nothing was loaded or measured"
    )


def _models(plan: Plan) -> Table:
    table = Table("model", "on", "weights", "cache a token", "bridges", "carried a pass")
    for one in plan.models:
        shared = f" (those of {one.shares_with})" if one.shares_with else ""
        cache = "unknown" if one.cache_bytes_per_token is None else one.cache_bytes_per_token
        cells = [one.name, _where(one), gigabytes(sum(one.weights.values())) + shared]
        cells += [cache if isinstance(cache, str) else gigabytes(cache)]
        table.add_row(*cells, gigabytes(one.bridge_bytes), gigabytes(one.streamed_bytes))
    return table


def _where(model: PlannedModel) -> str:
    """One device, or how many bytes lie on each."""
    if not isinstance(model.device_map, dict):
        return str(model.device_map)
    return ", ".join(f"{place}: {gigabytes(count)}" for place, count in model.weights.items())


def _devices(plan: Plan) -> Table:
    table = Table("device", "may take", "used", "share")
    for device, memory in plan.machine.memory.items():
        used = plan.used.get(device, 0)
        share = f"{used / memory:.0%}" if memory else "-"
        table.add_row(str(device), gigabytes(memory), gigabytes(used), share)
    return table


def _crossings(plan: Plan) -> Table:
    table = Table("what crosses", "from", "to", "messages a step", "a token", "time a token")
    for one in plan.crossings:
        time = "unknown" if one.seconds is None else f"{one.seconds * 1e6:.1f} us"
        cells: list[Any] = [one.what, one.source, one.target, one.messages]
        table.add_row(*map(str, cells), gigabytes(one.num_bytes), time)
    return table
