"""Draws a graph as SVG: levels from left to right, the latent space between, strengths and routing on the lines."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from .config import GraphConfig
from .model import LatentGraph

COLUMN, ROW, BOX, HEIGHT, MARGIN = 300, 92, 180, 60, 24
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2430}.small{font-size:11px;fill:#5b6475}"
    ".node{fill:#eef3fb;stroke:#4a6fa5}.space{fill:#fdf3e1;stroke:#c48a2a}.out{fill:#e9f6ec;stroke:#3d8b57}"
    "line{stroke:#8a93a6}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e9f0}.small{fill:#a3acbd}.node{fill:#22304a}"
    ".space{fill:#43351a}.out{fill:#1d3a27}}"
)


def draw(graph: LatentGraph | GraphConfig, routing: Mapping[str, float] | None = None) -> str:
    """Returns an SVG picture.

    Args:
        graph: built, for learned strengths and widths, or its config alone.
        routing: by node that the output reads, how much it is listened to; what a built graph has measured where left
            out, and even lines where it has not.
    """
    config = graph if isinstance(graph, GraphConfig) else graph.config
    built = None if isinstance(graph, GraphConfig) else graph
    if routing is None and built is not None:
        routing = built.routing
    levels = config.levels
    rows = max(len(level) for level in levels)
    width = 2 * MARGIN + COLUMN * len(levels) + BOX
    height = 2 * MARGIN + rows * ROW + 20
    places = {
        name: (MARGIN + COLUMN * column, MARGIN + 20 + _offset(rows, len(level)) + ROW * row)
        for column, level in enumerate(levels)
        for row, name in enumerate(level)
    }
    parts = [_line(config, built, places, name) for name in config.hearing]
    out = (MARGIN + COLUMN * len(levels), MARGIN + 20 + _offset(rows, 1))
    for name in config.read:
        share = (routing or {}).get(name)
        parts.append(_to_output(places[name], out, share))
    parts += [_box(config, built, name, *places[name]) for name in config.nodes]
    parts.append(_output(config, *out))
    parts += [
        f'<text class="small" x="{MARGIN + COLUMN * column}" y="{MARGIN}">level {column + 1}</text>'
        for column in range(len(levels))
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="feedforward graph of {len(config.nodes)} frozen models">\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _offset(rows: int, own: int) -> float:
    return (rows - own) * ROW / 2


def _box(config: GraphConfig, built: LatentGraph | None, name: str, x: float, y: float) -> str:
    node = config.nodes[name]
    ends = node if built is None else built.nodes[name]
    told = f"read at {_depth(ends.layer)}, {node.pooling}"
    if node.hears:
        told = f"hears at {_depth(ends.at)}, {told}"
    source = str(node.model) if node.model.base else "passed in loaded"
    return (
        f'<rect class="node" x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="8"/>'
        f'<text x="{x + 10}" y="{y + 20}">{escape(name)}</text>'
        f'<text class="small" x="{x + 10}" y="{y + 36}">{escape(_short(source))}</text>'
        f'<text class="small" x="{x + 10}" y="{y + 51}">{escape(told)}</text>'
    )


def _depth(value: int | float) -> str:
    return f"{value:.0%}" if isinstance(value, float) else str(value)


def _short(text: str, limit: int = 28) -> str:
    return text if len(text) <= limit else f"…{text[-limit + 1 :]}"


def _line(
    config: GraphConfig,
    built: LatentGraph | None,
    places: Mapping[str, tuple[float, float]],
    name: str,
) -> str:
    """Lines from all that a node hears through one point of the latent space."""
    x, y = places[name]
    middle = (x - 60, y + HEIGHT / 2)
    lines = [
        f'<line x1="{places[one][0] + BOX}" y1="{places[one][1] + HEIGHT / 2}" x2="{middle[0]}" y2="{middle[1]}"/>'
        for one in config.nodes[name].hears
    ]
    lines.append(
        f'<line x1="{middle[0]}" y1="{middle[1]}" x2="{x}" y2="{middle[1]}" stroke-width="2"/>'
    )
    lines.append(f'<circle class="space" cx="{middle[0]}" cy="{middle[1]}" r="13"/>')
    strength = _strength(config, built, name)
    lines.append(f'<text class="small" x="{middle[0] + 16}" y="{middle[1] - 6}">{strength}</text>')
    return "".join(lines)


def _strength(config: GraphConfig, built: LatentGraph | None, name: str) -> str:
    value = config.nodes[name].strength
    module = built.hear[name] if built is not None else None
    if module is not None and hasattr(module, "strength"):
        value = float(module.strength().detach())
    return f"{value:.2f}"


def _to_output(start: tuple[float, float], out: tuple[float, float], share: float | None) -> str:
    x1, y1 = start[0] + BOX, start[1] + HEIGHT / 2
    x2, y2 = out[0], out[1] + HEIGHT / 2
    thick = 1.5 if share is None else 1 + 6 * share
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke-width="{thick:.1f}"/>'
    if share is None:
        return line
    label = f'<text class="small" x="{x1 + 12}" y="{y1 - 6}">{share:.0%}</text>'
    return line + label


def _output(config: GraphConfig, x: float, y: float) -> str:
    output = config.output
    told = (
        f"{output.choices} choices, {output.layout}"
        if config.voice is None
        else f"{config.voice} speaks"
    )
    return (
        f'<rect class="out" x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="8"/>'
        f'<text x="{x + 10}" y="{y + 20}">output: {output.readout}</text>'
        f'<text class="small" x="{x + 10}" y="{y + 38}">{escape(told)}</text>'
    )
