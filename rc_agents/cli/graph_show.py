"""`rc-agents graph show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rc_agents.errors import ConfigError


def show(
    model: Annotated[str, typer.Argument(help="A trained graph, or a graph's file of YAML.")],
    output: Annotated[
        Path | None, typer.Option(help="Write the picture here; printed by default.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the picture, or where it is, as JSON.")
    ] = False,
) -> None:
    """Draw a graph as SVG: levels, strengths, and routing where it was measured. Loads no model."""
    from rc_agents import graph as graphs

    place = Path(model).expanduser()
    data = place.is_file() or place.suffix in (".yaml", ".yml", ".json")
    config, routing = (graphs.GraphConfig.of(model), {}) if data else graphs.outline(model)
    picture = graphs.draw(config, routing or None)
    if output is None:
        print(json.dumps({"svg": picture}) if as_json else picture, end="\n" if as_json else "")
        return
    try:
        output.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror or error}") from error
    print(json.dumps({"path": str(output)}) if as_json else output)
