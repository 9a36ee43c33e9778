"""The demo's page: one HTML file, plots inside, from the results alone."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d8dbe0; --soft: #f4f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --paper: #16181c; --line: #3a3d44; --soft: #22252b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; } figure svg { width: 100%; height: auto; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes `report.html` and returns its path."""
    how = {key: results[key] for key in ("provenance", "settings", "seconds")}
    sections = [
        "<h1>One pass over three frozen models</h1>",
        "<p>The anchor (SmolLM2-135M) does not know ICD-10-CM codes; the medical specialist does. Bridges between "
        "their residual streams were trained on other codes than the ones asked here. No base weight was changed.</p>",
        "<h2>Answers</h2>",
        _answers(results["answers"]),
        "<h2>Accuracy on held-out codes</h2>",
        _plot(_accuracy_plot, results["accuracy"]),
        _accuracy(results["accuracy"]),
        "<h2>Perplexity on held-out text</h2>",
        _plot(_perplexity_plot, results["perplexity"]),
        _perplexity(results["perplexity"]),
        "<h2>Time to a finished answer</h2>",
        _latency(results["latency"]),
        "<h2>How it was measured</h2>",
        f"<pre>{html.escape(json.dumps(how, indent=2))}</pre>",
    ]
    page = folder / "report.html"
    body = "\n".join(sections)
    page.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>rc_agents demo</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>{body}</body></html>\n',
        encoding="utf-8",
    )
    return page


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns an HTML table; numbers come as text, cells are escaped."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _answers(rows: Sequence[dict[str, str]]) -> str:
    return table(
        ["code", "right title", "frozen anchor", "ensemble"],
        [[row["code"], row["title"], row["frozen anchor"], row["ensemble"]] for row in rows],
    )


def _accuracy(found: dict[str, Any]) -> str:
    return table(
        ["", "exact match", "choice among 10"],
        [[n, _percent(v["exact_match"]), _percent(v["choice_of_10"])] for n, v in found.items()],
    )


def _percent(share: dict[str, Any]) -> str:
    low, high = share["wilson_95"]
    return f"{100 * share['value']:.1f} % ({share['hits']}/{share['count']}, 95 % {100 * low:.1f} to {100 * high:.1f})"


def _perplexity(found: dict[str, Any]) -> str:
    rows = []
    for kind, value in found.items():
        frozen, coupled = value["frozen anchor"], value["ensemble"]
        rows.append(
            [
                kind,
                f"{frozen['value']:.2f}",
                f"{coupled['value']:.2f}",
                f"{100 * value['change']:+.1f} %",
                f"{coupled['documents']} documents, {coupled['tokens']} tokens",
            ]
        )
    return table(["text", "frozen anchor", "ensemble", "change", "on"], rows)


def _latency(found: dict[str, Any]) -> str:
    base = found["handoff"]["median_s"]
    rows = [
        [
            name,
            f"{value['median_s']:.2f} s",
            f"{value['median_s'] / base:.2f}",
            f"{value['right']}/{value['count']}",
        ]
        for name, value in found.items()
    ]
    return table(["", "median", "against the handoff", "right"], rows)


def _plot(draw: Any, found: dict[str, Any]) -> str:
    """Returns a figure as SVG; a sentence where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>For plots: pip install 'rc-agents[plots]'.</p>"
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    draw(figure.subplots(), found)
    data = io.StringIO()
    figure.savefig(data, format="svg")
    return "<figure>" + data.getvalue()[data.getvalue().index("<svg") :] + "</figure>"


def _accuracy_plot(axes: Any, found: dict[str, Any]) -> None:
    names = list(found)
    for shift, (key, label) in enumerate(
        (("exact_match", "exact match"), ("choice_of_10", "choice among 10"))
    ):
        shares = [found[name][key] for name in names]
        values = [100 * share["value"] for share in shares]
        errors = [
            [100 * (share["value"] - share["wilson_95"][0]) for share in shares],
            [100 * (share["wilson_95"][1] - share["value"]) for share in shares],
        ]
        places = [k + 0.38 * shift for k in range(len(names))]
        axes.barh(
            places,
            values,
            height=0.34,
            xerr=[[max(0, e) for e in side] for side in errors],
            capsize=3,
            label=label,
        )
    axes.set_yticks([k + 0.19 for k in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("% right, 95 % Wilson interval")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _perplexity_plot(axes: Any, found: dict[str, Any]) -> None:
    kinds = list(found)
    for shift, name in enumerate(("frozen anchor", "ensemble")):
        places = [k + 0.38 * shift for k in range(len(kinds))]
        axes.barh(places, [found[kind][name]["value"] for kind in kinds], height=0.34, label=name)
    axes.set_yticks([k + 0.19 for k in range(len(kinds))], kinds)
    axes.invert_yaxis()
    axes.set_xlabel("perplexity (lower is better)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
