"""Tables of the knowledge-transfer benchmark, from the cells' JSON alone."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rc_agents.benchmarks.cells import ALONE, UNTRAINED, read
from rc_agents.benchmarks.methods.registry import METHODS
from rc_agents.benchmarks.settings import Recipe
from rc_agents.benchmarks.statistics import Interval, hierarchical, paired, wilson

from rc_agents import BridgeConfig

Record = dict[str, Any]

CONTROLS = (
    "frozen_anchor",
    "zero_source",
    "shuffled_source",
    "random_weight_specialist",
    "self_bridge",
    "linear_adapter",
    "lora",
)
"""Methods without what the specialist knows: the best of them is what coupling is compared with."""
HALVES = ("specialist", "second_specialist", "without_first", "without_second")
"""Of a chain these know one link each, so they are controls there."""
OWNERS = ("specialist", "second_specialist")


def report(folder: Path) -> str:
    """Returns the tables of every setting in a folder of results, as Markdown."""
    parts = ["# Knowledge transfer\n"]
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        records = [read(path) for path in sorted(place.glob("*.json"))]
        if records:
            parts.append(setting_tables(place.name, records))
    return "\n".join(parts)


def setting_tables(name: str, records: Sequence[Record]) -> str:
    """Returns the tables of one setting."""
    by_method: dict[str, list[Record]] = defaultdict(list)
    records, older = _of_one_recipe(records)
    for record in sorted(records, key=lambda one: one["seed"]):
        by_method[record["method"]].append(record)
    scored = {
        method: found
        for method in sorted(by_method, key=_order)
        if (found := [one for one in by_method[method] if "scores" in one])
    }
    lines = [f"## {name}\n"]
    if not scored:
        return "\n".join(lines + _absent(by_method))
    first = next(iter(scored.values()))[0]
    for place, world in enumerate(first["scores"]["worlds"]):
        for part, found in first["scores"]["worlds"][world].items():
            if "exact" in found:
                lines += _facts_table(scored, world, part, place)
        if "strangers" in first["scores"]["worlds"][world]:
            lines += _strangers_table(scored, world)
    lines += _elsewhere_table(scored) + _effort_table(scored) + _absent(by_method)
    if older:
        names = ", ".join(f"{one['method']} seed {one['seed']}" for one in older)
        lines.append(f"Left out, as made with another recipe, questions or specialists: {names}.\n")
    return "\n".join(lines)


def _of_one_recipe(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Returns the records made as the newest trained one was, of the same questions and specialists; and the others."""
    if not records:
        return [], []
    trained = [one for one in records if one["method"] not in UNTRAINED]
    newest = max(trained or records, key=lambda one: (one["provenance"]["date"], one["method"]))
    asked = {one["seed"]: one["asked"] for one in sorted(records, key=_date) if "asked" in one}
    asked[newest["seed"]] = newest.get("asked")
    parts: tuple[list[Record], list[Record]] = ([], [])
    for one in records:
        read = () if one["method"] in UNTRAINED else ("recipe", "rates")
        beside = one["method"] not in ALONE
        same = (
            all(
                _whole(one["config"])[name] == _whole(newest["config"])[name]
                for name in (*read, "sizes")
            )
            and (not beside or one["adapters"] == newest["adapters"])
            and one.get("asked") == asked.get(one["seed"])
        )
        parts[not same].append(one)
    return parts


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a cell's config with the usual value of the fields that its recipe did not have yet."""
    usual = asdict(Recipe(bridge=BridgeConfig()))
    recipe = usual | config["recipe"]
    for part in ("bridge", "train"):
        recipe[part] = usual[part] | config["recipe"][part]
    plain: dict[str, Any] = json.loads(json.dumps({**config, "recipe": recipe}, default=str))
    return plain


def _date(record: Record) -> str:
    return str(record["provenance"]["date"])


def _order(method: str) -> int:
    names = list(METHODS)
    return names.index(method) if method in names else len(names)


def outcomes(records: Sequence[Record], world: str, part: str, kind: str) -> list[list[float]]:
    """Returns items' outcomes by seed."""
    found = [one["scores"]["worlds"][world][part] for one in records]
    strings = [one[kind] if isinstance(one[kind], str) else one[kind]["outcomes"] for one in found]
    return [[float(bit) for bit in string] for string in strings]


def _facts_table(scored: dict[str, list[Record]], world: str, part: str, place: int) -> list[str]:
    owners = _owners(scored, world, place)
    owner = next((name for name in owners if name in scored), None)
    own = hierarchical(outcomes(scored[owner], world, part, "exact")).value if owner else math.nan
    chances = [
        one["scores"]["worlds"][world][part]["choice"]["chance"]
        for one in scored[next(iter(scored))]
    ]
    lines = [
        f"### {world}, {part.replace('_', ' ')} facts (chance in choice {100 * chances[0]:.0f} %)\n",
        f"| method | seeds x items | exact match | of {owner or 'the specialist'}'s | choice among ten | by seed |",
        "|---|---|---|---|---|---|",
    ]
    for method, records in scored.items():
        exact, choice = (outcomes(records, world, part, kind) for kind in ("exact", "choice"))
        found = _share(exact)
        ratio = f"{100 * found.value / own:.1f} %" if own > 0 else "-"
        seeds = ", ".join(f"{100 * sum(one) / len(one):.1f}" for one in exact)
        items = f"{len(exact)} x {len(exact[0])}"
        lines.append(
            f"| {method} | {items} | {percent(found)} | {ratio} | {percent(_share(choice))} | {seeds} |"
        )
    return [*lines, "", *_gain(scored, world, part)]


def _owners(scored: dict[str, list[Record]], world: str, place: int) -> Sequence[str]:
    """Who is asked in the ensemble's place: the specialist of this world, or two of them in turns for a chain."""
    return ("text_handoff",) if _is_chain(scored, world) else OWNERS[place : place + 1]


def _is_chain(scored: dict[str, list[Record]], world: str) -> bool:
    return "apart" in next(iter(scored.values()))[0]["scores"]["worlds"][world]


def _share(groups: Sequence[Sequence[float]]) -> Interval:
    """One seed gives Wilson's interval, several the hierarchical bootstrap's."""
    if len(groups) == 1:
        return wilson(int(sum(groups[0])), len(groups[0]))
    return hierarchical(groups)


def _gain(scored: dict[str, list[Record]], world: str, part: str) -> list[str]:
    """The gain that only the specialist explains: coupled minus the best control, on the same items."""
    if "coupled" not in scored:
        return []
    mine = {one["seed"]: one for one in scored["coupled"]}
    best: tuple[float, str] | None = None
    for control in (*CONTROLS, *(HALVES if _is_chain(scored, world) else ())):
        both = [one for one in scored.get(control, []) if one["seed"] in mine]
        if both:
            value = hierarchical(outcomes(both, world, part, "exact"), draws=1).value
            best = max(best or (value, control), (value, control))
    if best is None:
        return []
    others = [one for one in scored[best[1]] if one["seed"] in mine]
    ours = [mine[one["seed"]] for one in others]
    gain = paired(*(outcomes(each, world, part, "exact") for each in (ours, others)))
    return [
        f"Coupled minus the best control without the specialist's knowledge ({best[1]}): {points(gain)}.\n"
    ]


def _strangers_table(scored: dict[str, list[Record]], world: str) -> list[str]:
    lines = [
        f"### {world}, strangers\n",
        "| method | same 16 tokens as the anchor | KL at the answer, nats | invents an answer | anchor does |",
        "|---|---|---|---|---|",
    ]
    for method, records in scored.items():
        same, invented, anchor = (
            _share(outcomes(records, world, "strangers", kind))
            for kind in ("same", "invented", "anchor_invented")
        )
        kls = [one["scores"]["worlds"][world]["strangers"]["kl"] for one in records]
        kl = "other vocabulary" if None in kls else f"{hierarchical(kls).value:.3f}"
        lines.append(
            f"| {method} | {percent(same)} | {kl} | {percent(invented)} | {100 * anchor.value:.1f} % |"
        )
    return [*lines, ""]


def _elsewhere_table(scored: dict[str, list[Record]]) -> list[str]:
    lines = [
        "### Elsewhere\n",
        "| method | general perplexity | against the frozen anchor | anchor's own questions: same 32 tokens |",
        "|---|---|---|---|",
    ]
    for method, records in scored.items():
        general = [one["scores"]["general"] for one in records]
        nats = sum(sum(one["nll"]) for one in general) / sum(sum(one["tokens"]) for one in general)
        own = _share([[float(bit) for bit in one["scores"]["own"]["same"]] for one in records])
        lines.append(
            f"| {method} | {math.exp(nats):.2f} | {_against_anchor(general)} | {percent(own)} |"
        )
    return [*lines, ""]


def _against_anchor(general: Sequence[Record]) -> str:
    if any(one["tokens"] != one["anchor_tokens"] for one in general):
        return "other tokens"
    extra = [[a - b for a, b in zip(one["nll"], one["anchor_nll"], strict=True)] for one in general]
    ratio = hierarchical(extra, [one["tokens"] for one in general])
    value, low, high = (100 * math.expm1(one) for one in (ratio.value, ratio.low, ratio.high))
    return f"{value:+.2f} % ({low:+.2f} to {high:+.2f})"


def _effort_table(scored: dict[str, list[Record]]) -> list[str]:
    lines = [
        "### Effort\n",
        "| method | trained parameters | steps | learning rates tried: exact on validation | training s | "
        "scoring s | model passes | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, records in scored.items():
        first = records[0]
        tried = "; ".join(
            f"{_tried(one)}: {100 * one['exact']:.0f} % (perplexity x{one['perplexity']:.3f})"
            for one in first["search"]
        )
        mean = {
            name: sum(one["cost"][name] for one in records) / len(records)
            for name in ("cpu_seconds", "passes", "tokens")
        }
        training = sum(one["training_seconds"] for one in records) / len(records)
        lines.append(
            f"| {method} | {first['parameters']:,} | {first['steps']} | {tried or '-'} | {training:.0f} | "
            f"{mean['cpu_seconds']:.0f} | {mean['passes']:.0f} | {mean['tokens']:.0f} |"
        )
    return [*lines, ""]


def _tried(one: Record) -> str:
    return f"{one['rate']:g}" if "rate" in one else str(one.get("prompt", "?"))


def _absent(by_method: dict[str, list[Record]]) -> list[str]:
    reasons = {
        method: records[0]["not_applicable"]
        for method, records in by_method.items()
        if "not_applicable" in records[0]
    }
    return [f"Not applicable: {method} ({why}).\n" for method, why in sorted(reasons.items())]


def percent(interval: Interval) -> str:
    """Returns a share with its interval in percent."""
    return f"{100 * interval.value:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def points(interval: Interval) -> str:
    """Returns a difference with its interval in percentage points."""
    return f"{100 * interval.value:+.1f} points ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
