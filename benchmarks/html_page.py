"""A report as one HTML page: tables sort by a click, plots are drawn in it, light and dark; no file besides."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from rc_agents.benchmarks.statistics import Interval

if TYPE_CHECKING:
    from rc_agents.benchmarks.suite_report import Page, Table

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --mark: #7aa2ff; } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; vertical-align: top; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort] button::after { content: " ▾"; } th[aria-sort="ascending"] button::after { content: " ▴"; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; } figcaption { font-size: .85rem; }
"""
SCRIPT = """
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const column = [...head.parentNode.children].indexOf(head);
  const up = head.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("th").forEach(one => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const read = row => {
    const text = row.children[column].textContent, number = parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(number) ? text : number;
  };
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  [...body.rows].sort((a, b) => (up ? 1 : -1) * order(read(a), read(b))).forEach(row => body.append(row));
}));
"""
WIDTH, LABEL, ROW = 420, 170, 20


def html(made: Page) -> str:
    """Returns the page."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(made.title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(made.title)}</h1><p>{escape(made.about)}</p>",
    ]
    for heading, tables, closing in made.sections:
        parts.append(f"<h2>{escape(heading)}</h2>")
        parts += [_table(table) for table in tables]
        if closing:
            lines = "".join(f"<li>{escape(line)}</li>" for line in closing)
            parts.append(f"<ul>{lines}</ul>")
    parts.append(f"<script>{SCRIPT}</script></body></html>")
    return "\n".join(parts) + "\n"


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in table.head
    )
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    drawn = "".join(
        f"<figure>{_dots(rows, name)}<figcaption>{escape(name)}</figcaption></figure>"
        for name, rows in table.plots.items()
    )
    plots = f'<div class="plots">{drawn}</div>' if drawn else ""
    return (
        f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{note}{plots}"
    )


def _dots(rows: Sequence[tuple[str, Interval]], name: str) -> str:
    """A dot and its interval a method."""
    low = min(one.low for _, one in rows)
    span = (max(one.high for _, one in rows) - low) or 1.0

    def x(value: float) -> str:
        return f"{LABEL + (value - low) / span * (WIDTH - LABEL - 20) + 8:.1f}"

    marks = []
    for number, (method, one) in enumerate(rows):
        y = number * ROW + ROW // 2
        marks.append(
            f'<text x="{LABEL - 6}" y="{y + 4}" text-anchor="end">{escape(method)}</text>'
            f'<line x1="{x(one.low)}" x2="{x(one.high)}" y1="{y}" y2="{y}" stroke="currentColor"/>'
            f'<circle cx="{x(one.value)}" cy="{y}" r="4" fill="var(--mark)"/>'
        )
    base = len(rows) * ROW
    ends = (
        f'<text x="{x(low)}" y="{base + 14}">{low:.4g}</text>'
        f'<text x="{x(low + span)}" y="{base + 14}" text-anchor="end">{low + span:.4g}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {base + 20}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(name, quote=True)} by method">{"".join(marks)}{ends}</svg>'
    )
