"""What the cost model says of ensembles and links that were not measured: `python -m rc_agents.benchmarks.extrapolate`.

Prints the extrapolation tables of docs/scaling.md. A cell is milliseconds a decoded token / seconds for a prompt;
bold is at most twice what the models need by themselves. Specialists are of the anchor's own size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from rc_agents.benchmarks.cost_model import Plan, Port, pass_seconds, spread, traffic

from rc_agents.topology import Topology

PROMPT = 1000
HANDLING = 8e-5
"""Seconds for a frame of one token's state, sent or taken in: 60 to 105 microseconds at width 4096."""


@dataclass(frozen=True)
class Size:
    """A model of which nothing was measured.

    Attributes:
        name: of it.
        width: of its states.
        token, prompt: assumed seconds for a decoded token and for a prompt of 1,000.
    """

    name: str
    width: int
    token: float
    prompt: float


SIZES = (Size("7B", 4096, 0.012, 0.07), Size("70B", 8192, 0.030, 0.12))


@dataclass(frozen=True)
class Link:
    """A kind of network.

    Attributes:
        name: of it.
        latency: seconds one way between any two processes.
        specialist, anchor: ports.
    """

    name: str
    latency: float
    specialist: Port
    anchor: Port


def _even(name: str, latency: float, rate: float) -> Link:
    port = Port(up=rate, down=rate)
    return Link(name, latency, port, port)


LINKS = (
    _even("10 Gbit/s LAN, 0.05 ms", 5e-5, 1e10),
    _even("1 Gbit/s LAN, 0.2 ms", 2e-4, 1e9),
    _even("100 Mbit/s WAN, 20 ms", 0.02, 1e8),
    Link("edge 10 up / 50 down, 30 ms", 0.03, Port(up=1e7, down=5e7), Port(up=1e9, down=1e9)),
)
TOPOLOGIES = ("unilateral", "star_bilateral", "multi_bilateral")


def plan(
    size: Size, topology: str, sites: int, count: int, tokens: int, wire: str = "exact"
) -> Plan:
    """One pass of an anchor with so many specialists, all of one size; states of two bytes a number."""
    names = ["anchor", *(f"specialist_{k}" for k in range(count))]
    depths = [(site + 1) / sites for site in range(sites)]
    seconds = size.token if tokens == 1 else size.prompt
    return Plan(
        compute={name: spread(seconds, depths) for name in names},
        edges=[tuple(edge) for edge in getattr(Topology, topology)(names).edges],
        widths=dict.fromkeys(names, size.width),
        tokens=tokens,
        wire=wire,
        itemsize=2,
        handling=HANDLING,
    )


def seconds(link: Link, one: Plan) -> float:
    """Of a pass over such a link."""
    ports = {name: link.anchor if name == "anchor" else link.specialist for name in one.compute}
    return pass_seconds(one, ports, link.latency)


def cell(size: Size, link: Link, topology: str, sites: int, count: int, wire: str) -> str:
    """Milliseconds a token / seconds a prompt."""
    shown = []
    for tokens, alone, factor, digits in ((1, size.token, 1e3, 0), (PROMPT, size.prompt, 1, 2)):
        took = seconds(link, plan(size, topology, sites, count, tokens, wire))
        text = f"{factor * took:,.{digits if took < 10 else 0}f}"
        shown.append(f"**{text}**" if took <= 2 * alone else text)
    return " / ".join(shown)


def table(size: Size, sites: Sequence[int], counts: Sequence[int], wire: str) -> str:
    """A Markdown table: links and specialists down, topologies and sites across."""
    columns = [(topology, count) for topology in TOPOLOGIES for count in sites]
    heads = [f"{topology.split('_')[0]}, {n} site{'s' * (n > 1)}" for topology, n in columns]
    lines = [
        f"| link | specialists | {' | '.join(heads)} |",
        f"|---|---:|{'---:|' * len(columns)}",
    ]
    for link in LINKS:
        for count in counts:
            cells = [
                cell(size, link, topology, number, count, wire) for topology, number in columns
            ]
            lines.append(f"| {link.name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def volumes(sites: Sequence[int], counts: Sequence[int]) -> str:
    """A Markdown table of kilobytes a decoded token: at the anchor's port, both ways, and all in all."""
    lines = [
        "| topology | sites | specialists | 7B: anchor in / out | 7B: all | 70B: anchor in / out | 70B: all |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for topology in TOPOLOGIES:
        for number in sites:
            for count in counts:
                cells = []
                for size in SIZES:
                    sent = traffic(plan(size, topology, number, count, 1))
                    heard = sum(v for (_, target), v in sent.items() if target == "anchor")
                    told = sum(v for (source, _), v in sent.items() if source == "anchor")
                    cells.append(f"{heard / 1e3:,.0f} / {told / 1e3:,.0f}")
                    cells.append(f"{sum(sent.values()) / 1e3:,.0f}")
                lines.append(f"| {topology} | {number} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wire", default="exact", help="exact (bfloat16 models') or int8")
    parser.add_argument("--specialists", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--sites", type=int, nargs="+", default=[1, 5])
    arguments = parser.parse_args()
    print(volumes(arguments.sites, arguments.specialists))
    for size in SIZES:
        print(
            f"\n{size.name}, width {size.width}, wire {arguments.wire}: alone {1e3 * size.token:.0f} ms a token, "
            f"{size.prompt:.2f} s a prompt of {PROMPT}\n"
        )
        print(table(size, arguments.sites, arguments.specialists, arguments.wire))


if __name__ == "__main__":
    main()
