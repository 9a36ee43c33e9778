"""The report of a suite, from its JSON alone: Markdown, an HTML page and PNGs. The same JSON gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rc_agents.benchmarks.collected import (
    COUPLED,
    Record,
    Results,
    best_control,
    compared,
    measures,
    over_seeds,
    scores,
)
from rc_agents.benchmarks.intervals import Difference
from rc_agents.benchmarks.scores import KINDS, Score
from rc_agents.benchmarks.statistics import Interval

ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}


@dataclass(frozen=True)
class Table:
    """A table, with what a plot of it shows.

    Attributes:
        title: above it.
        head: of the columns.
        rows: texts.
        note: below it.
        plots: by column, the rows' intervals.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    plots: Mapping[str, Sequence[tuple[str, Interval]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: of the page.
        about: a paragraph.
        sections: of the settings: a heading, its tables and closing lines.
    """

    title: str
    about: str
    sections: Sequence[tuple[str, Sequence[Table], Sequence[str]]]


def page(results: Results) -> Page:
    """Returns the report of a folder of results."""
    sections = []
    for setting, part in results.plan["settings"].items():
        scored = results.scored(setting)
        tables = [
            _measures(scored, group, names) for group, names in measures(scored).items() if scored
        ]
        tables += [_published(scored, results.plan.get("published", {}).get(setting, {}))]
        tables += [_gains(scored)] if scored else []
        tables += [_effort(scored), _searches(scored)] if scored else []
        lines = [f"Missing: {line}" for line in results.absent(setting)]
        if part["leaks"]:
            lines.insert(0, f"Its test texts train, on purpose: {part['leaks']}")
        sections.append((setting, [table for table in tables if table.rows], lines))
    if results.sweep:
        sections.append(("Cost of text between models", _sweeps(results.sweep), []))
    sections.append(("Where the figures come from", [_sources(results)], _closing(results)))
    return Page(f"Suite {results.plan['suite']}", results.plan["about"], sections)


def _measures(
    scored: Mapping[str, Mapping[int, Record]], group: str, names: Sequence[str]
) -> Table:
    rows, plots = [], {}
    head = ["method", "seeds x items"]
    firsts: dict[str, Score] = {}
    for measure in names:
        name = f"{group}/{measure}"
        firsts[measure] = next(
            found[0] for each in scored.values() if (found := scores(each, name))
        )
        unit = KINDS[firsts[measure].kind].unit
        head.append(
            f"{measure.replace('_', ' ')} {f'({unit}) ' if unit else ''}{ARROWS[firsts[measure].better]}".strip()
        )
        plots[head[-1]] = [
            (method, over_seeds(each, name))
            for method, each in scored.items()
            if scores(each, name)
        ]
    for method, each in scored.items():
        keys = [f"{group}/{measure}" for measure in names]
        there = next((key for key in keys if scores(each, key)), None)
        if there is None:
            continue
        own = [one for seed, one in each.items() if one.get("taken_from", seed) == seed]
        items = sorted({len(one.values) for one in scores(each, there)})
        cells = [value(each, key) if scores(each, key) else "-" for key in keys]
        rows.append([method, f"{len(own) or 1} x {'/'.join(map(str, items))}", *cells])
    return Table(group, head, rows, plots=plots)


def value(each: Mapping[int, Record], name: str) -> str:
    """Returns a method's measure over its seeds as text, with its 95 % interval."""
    return within(over_seeds(each, name), scores(each, name)[0].kind)


def within(one: Interval, kind: str) -> str:
    """Returns a value of a kind with its interval as text."""
    digits = KINDS[kind].digits
    return f"{one.value:.{digits}f} ({one.low:.{digits}f} to {one.high:.{digits}f})"


def gain(found: Difference, kind: str) -> str:
    """Returns a difference as text."""
    one = found.interval
    if found.ratio:
        shown = f"{one.value:+.1f} % ({one.low:+.1f} to {one.high:+.1f})"
    else:
        digits, unit = KINDS[kind].digits, KINDS[kind].unit
        unit = "points" if unit == "%" else unit
        shown = f"{one.value:+.{digits}f} {unit} ({one.low:+.{digits}f} to {one.high:+.{digits}f})"
    verdict = {1: "better", -1: "worse", 0: "no difference shown"}[found.better]
    return f"{shown}, p {'< 0.001' if found.p < 0.001 else f'= {found.p:.3f}'}: {verdict}"


def _published(
    scored: Mapping[str, Mapping[int, Record]], figures: Mapping[str, Mapping[str, float]]
) -> Table:
    """The figures that others have published, with ours where there are any."""
    rows = []
    for name, by_method in figures.items():
        for method, figure in by_method.items():
            each = scored.get(method, {})
            ours = value(each, name) if scores(each, name) else "not run"
            rows.append([name, method, f"{figure:g}", ours])
    return Table("beside what is published", ["measure", "method", "published", "here"], rows)


def _gains(scored: Mapping[str, Mapping[int, Record]]) -> Table:
    """What only the specialist explains: coupling against the best control without one, on the same items."""
    rows = []
    for group, names in measures(scored).items():
        for measure in names:
            name = f"{group}/{measure}"
            control = best_control(scored, name)
            for method in COUPLED if control else ():
                found = compared(scored.get(method, {}), scored[str(control)], name)
                if found:
                    kind = scores(scored[method], name)[0].kind
                    seeds = str(len(found[1]))
                    rows.append([name, method, str(control), seeds, gain(found[0], kind)])
    return Table(
        "coupled minus the best control without the specialist's knowledge",
        ["measure", "method", "control", "seeds", "difference (95 %)"],
        rows,
    )


def _effort(scored: Mapping[str, Mapping[int, Record]]) -> Table:
    rows = []
    for method, each in scored.items():
        records = [one for one in each.values() if "taken_from" not in one] or [*each.values()]
        first = records[0]

        def mean(name: str, records: Sequence[Record] = records) -> float:
            return sum(one.get(name) or 0 for one in records) / len(records)

        memory = mean("peak_bytes")
        rows.append(
            [
                method,
                f"{first['parameters']:,}",
                str(first["steps"]),
                f"{mean('training_seconds'):.0f}",
                f"{mean('seconds'):.0f}",
                f"{mean('cpu_seconds'):.0f}",
                f"{memory / 2**20:.0f}" if memory else "-",
                *(f"{_cost(records, name):.0f}" for name in ("passes", "tokens")),
            ]
        )
    head = ["method", "trained parameters", "optimizer steps", "training s, search and all"]
    head += ["whole cell s", "processor s", "process peak MiB", "model passes", "tokens read"]
    note = (
        "Means over seeds. Passes and tokens are those of scoring, of all models. The peak is of the whole process, "
        "with every frozen model that it holds."
    )
    return Table("effort", head, rows, note)


def _cost(records: Sequence[Record], name: str) -> float:
    """Mean over records of what all tasks cost together."""
    return sum(task[name] for one in records for task in one["costs"].values()) / len(records)


def _searches(scored: Mapping[str, Mapping[int, Record]]) -> Table:
    rows = []
    for method, each in scored.items():
        for seed, record in each.items():
            tried = [_tried(one) for one in record["search"]]
            if tried and "taken_from" not in record:
                chosen = record["notes"].get("rate", record["notes"].get("prompt", ""))
                short = " ".join(str(chosen).split())
                rows.append([method, str(seed), "; ".join(tried), short])
    return Table(
        "search on validation", ["method", "seed", "tried: score on validation", "chosen"], rows
    )


def _tried(one: Mapping[str, object]) -> str:
    what = f"{one['rate']:g}" if "rate" in one else str(one.get("prompt"))
    shown = [f"{name} {one[name]:.3f}" for name in ("loss", "exact", "perplexity") if name in one]
    other = f", by seed {one['seed']}" if "seed" in one else ""
    return f"{what}: {', '.join(shown)}{other}"


def _sweeps(sweep: Record) -> list[Table]:
    """How many times as long text between models takes as the coupled pass, by what varies."""
    tables = []
    usual = {name: _usual([row[name] for row in sweep["rows"]]) for name in VARIED}
    for varied, told in VARIED.items():
        rows, plots = [], []
        for row in sorted(sweep["rows"], key=lambda one: one[varied]):
            if any(row[name] != usual[name] for name in VARIED if name != varied):
                continue
            seconds = row["seconds"]
            cells = [str(row[varied]), f"{median(seconds['coupled']):.2f}"]
            for name in ("one_shot", "multi_turn", "anchor"):
                pairs = zip(seconds[name], seconds["coupled"], strict=True)
                each = [one / coupled for one, coupled in pairs]
                cells.append(f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})")
                if name != "anchor":
                    found = Interval(median(each), min(each), max(each))
                    plots.append((f"{name}, {row[varied]}", found))
            rows.append(cells)
        others = ", ".join(f"{VARIED[name]} {usual[name]}" for name in VARIED if name != varied)
        head = [told, "coupled pass s", "one-shot handoff", "multi-turn handoff", "anchor alone"]
        rounds = len(seconds["coupled"])
        note = f"Times as long as the coupled pass: median of {rounds} rounds, least and most; {others}."
        tables.append(Table(told, head, rows, note, {"times as long as the coupled pass": plots}))
    return tables


VARIED = {
    "told": "tokens of a hand-over",
    "answer": "tokens of the answer",
    "context": "tokens of the question",
    "agents": "specialists",
}


def _usual(values: Sequence[int]) -> int:
    return max(sorted(set(values)), key=list(values).count)


def _sources(results: Results) -> Table:
    rows = []
    for setting, methods in results.cells.items():
        found: dict[tuple[str, ...], int] = {}
        for each in methods.values():
            for record in each.values():
                made = record.get("provenance")
                if not made:
                    continue
                hardware, versions = made["hardware"], made["versions"]
                key = (
                    made["git"],
                    f"{hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads",
                    f"torch {versions['torch']}, transformers {versions['transformers']}",
                )
                found[key] = found.get(key, 0) + 1
        rows += [[setting, str(count), *key] for key, count in sorted(found.items())]
    return Table("", ["setting", "cells", "code", "machine", "packages"], rows)


def _closing(results: Results) -> list[str]:
    lines = [
        f"Left out of this suite: {what}: {why}" for what, why in results.plan["absent"].items()
    ]
    return [
        *lines,
        "Intervals are 95 %: Wilson's for shares of one seed, else the hierarchical bootstrap over seeds and items "
        "(4,000 draws, seed 0); differences are paired on the same items.",
    ]


def markdown(made: Page) -> str:
    """Returns the page as Markdown."""
    lines = [f"# {made.title}", "", made.about, ""]
    for heading, tables, closing in made.sections:
        lines += [f"## {heading}", ""]
        for table in tables:
            lines += [f"### {table.title}", ""] if table.title else []
            lines.append("| " + " | ".join(table.head) + " |")
            lines.append("|" + "---|" * len(table.head))
            lines += ["| " + " | ".join(_cell(one) for one in row) + " |" for row in table.rows]
            lines += ["", *([table.note, ""] if table.note else [])]
        lines += [f"- {line}" for line in closing]
        lines += [""] if closing else []
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write(folder: Path, *, png: bool = True) -> list[Path]:
    """Writes `report.md`, `report.html` and PNGs of the plots beside the cells; returns what it wrote.

    Args:
        folder: of the results.
        png: whether to draw PNGs, which need matplotlib.
    """
    from rc_agents.benchmarks import html_page, plots

    made = page(Results.of(folder))
    written = []
    for name, text in (("report.md", markdown(made)), ("report.html", html_page.html(made))):
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    return written + (plots.draw(made, folder / "plots") if png else [])
