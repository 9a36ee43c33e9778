"""How a command names its ensemble, and what it may choose about it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import rc_agents
from rc_agents.errors import ConfigError, InputError
from rc_agents.service import load

Anchor = Annotated[
    str | None,
    typer.Option(help="Couple anew around this model (id, path or package:NAME), without MODEL."),
]
Specialists = Annotated[
    list[str] | None,
    typer.Option(
        "--specialist", metavar="NAME=REF[+ADAPTER]", help="A specialist for --anchor; repeatable."
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Device of all models (cpu, 0, auto), or of each: anchor=cpu,medical=0."),
]
DType = Annotated[
    str | None, typer.Option("--dtype", help="Weights' type: bfloat16, or anchor=float32,...")
]
Nodes = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The specialists run in processes of their own (`rc-agents node --role specialist`), which join this one "
        "here; beyond loopback needs a secret's file in RC_AGENTS_SECRET_FILE.",
    ),
]
SECRET = "RC_AGENTS_SECRET_FILE"
MODEL_HELP = "A saved ensemble or a single model: folder, hub id or package:NAME."


@contextmanager
def opened(
    model: str | None,
    anchor: str | None,
    specialists: list[str] | None,
    device_map: str | None,
    dtype: str | None,
    nodes: str | None = None,
) -> Iterator[rc_agents.CoupledForCausalLM]:
    """Yields what a command line names, as `open_model` does; with `nodes` the anchor of several processes.

    Args:
        nodes: where the specialists' processes join this one.
    """
    if nodes is None:
        yield open_model(model, anchor, specialists, device_map, dtype)
        return
    if model is None or specialists:
        raise ConfigError("--nodes needs a saved ensemble as MODEL, the same as the specialists'")
    made = _connected(model, nodes, device_map, dtype)
    try:
        yield made
    finally:
        made.elsewhere.close()


def _connected(model: str, nodes: str, device_map: str | None, dtype: str | None) -> Any:
    from rc_agents.nodes import NodeSettings, connect, read_secret

    file = os.environ.get(SECRET)
    settings = NodeSettings(secret=b"" if file is None else read_secret(file))
    options = {"device_map": by_name(device_map, place), "dtype": by_name(dtype, str)}
    options = {key: value for key, value in options.items() if value is not None}
    print(f"waiting for the specialists at {nodes}", file=sys.stderr)
    return connect(model, listen=nodes, settings=settings, **options)


def open_model(
    model: str | None,
    anchor: str | None,
    specialists: list[str] | None,
    device_map: str | None,
    dtype: str | None,
    **form: Any,
) -> rc_agents.CoupledForCausalLM:
    """Loads what a command line names: a model by name, or an ensemble that it puts together.

    Args:
        model: a saved ensemble or a single model.
        anchor, specialists: of a new ensemble.
        device_map, dtype: as on the command line.
        form: more settings of `rc_agents.couple` for a new ensemble that is going to be trained.

    Raises:
        RCError: neither or both are named, or it cannot be loaded.
    """
    options = {"device_map": by_name(device_map, place), "dtype": by_name(dtype, str)}
    if model is not None and anchor is not None:
        raise ConfigError(f"name a MODEL or an --anchor, not both (got {model!r} and {anchor!r})")
    if anchor is None:
        if model is None:
            raise ConfigError("which model? name a saved ensemble or a model, or use --anchor")
        if specialists:
            raise ConfigError("--specialist needs --anchor; a saved ensemble has its own")
        return load(model, **{key: value for key, value in options.items() if value is not None})
    chosen = dict(specialist(one) for one in specialists or [])
    if len(chosen) < len(specialists or []):
        raise ConfigError(
            f"each specialist needs a name of its own, got {', '.join(specialists or [])}"
        )
    made = rc_agents.couple(anchor, chosen, **options, **form)
    if chosen and not form:
        print(
            "note: new bridges are untrained, so the anchor answers as it would alone",
            file=sys.stderr,
        )
    return made


def specialist(text: str) -> tuple[str, rc_agents.ModelRef]:
    """Reads `name=ref` or `name=ref+adapter`; a folder with a plus in its name is one reference."""
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise ConfigError(f"a specialist is NAME=REF or NAME=REF+ADAPTER, got {text!r}")
    if Path(place).exists():
        return name, rc_agents.ModelRef(base=place)
    base, _, adapter = place.partition("+")
    return name, rc_agents.ModelRef(base=base, adapter=adapter or None)


def by_name(text: str | None, read: Callable[[str], Any]) -> Any:
    """Reads one value for all, or `name=value,name=value`."""
    if text is None or "=" not in text:
        return None if text is None else read(text)
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and equals and value for name, equals, value in pairs):
        raise ConfigError(f"expected one value for all or NAME=VALUE,NAME=VALUE, got {text!r}")
    return {name.strip(): read(value.strip()) for name, _, value in pairs}


def place(text: str) -> str | int:
    """Reads a device: a number, or its name."""
    return int(text) if text.isdecimal() else text


def number(text: str) -> float:
    """Reads a number."""
    try:
        return float(text)
    except ValueError:
        raise InputError(f"expected a number, got {text!r}") from None


def names(text: str | None) -> list[str] | None:
    """Reads `a,b`, `all` (None) or `none` (nobody)."""
    if text is None or text == "all":
        return None
    return [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]
