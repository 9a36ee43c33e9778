"""`rc-agents bench`: run a suite of benchmarks, report it, compare two methods."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rc_agents.errors import DataError, InputError

bench = typer.Typer(
    help="Run a suite of benchmarks; its report, and paired comparisons.",
    invoke_without_command=True,
    no_args_is_help=True,
    rich_markup_mode=None,
)
SuiteName = Annotated[
    str | None, typer.Option("--suite", help="A suite's name, or the path of its YAML file.")
]
Output = Annotated[
    Path | None, typer.Option(help="Folder of the results; benchmarks/results/NAME by default.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]


def results_folder(suite: str, output: Path | None) -> Path:
    """Returns where a suite's results lie: in the working tree where there is one, else where the command runs."""
    return output or Path("benchmarks") / "results" / suite


@bench.callback()
def run(
    context: typer.Context,
    suite: SuiteName = None,
    output: Output = None,
    settings: Annotated[
        list[str] | None, typer.Option("--setting", help="Only this setting; repeatable.")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Only this method; repeatable.")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="Only this seed; repeatable.")
    ] = None,
    kept: Annotated[
        Path | None,
        typer.Option(help="Folder for states and fitted bridges; in the user's cache by default."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no further cell after so many minutes.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves torch's own number.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where models go.")] = None,
    stand_ins: Annotated[
        bool, typer.Option("--stand-ins", help="Tiny random models and texts: does it run?")
    ] = False,
    list_cells: Annotated[
        bool, typer.Option("--list", help="Say which cells are missing or stale; run nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Runs the cells that are missing or out of date; a killed run goes on where it was."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise InputError(f"--json stands behind {context.invoked_subcommand}, not before it")
        return
    if suite is None:
        raise DataError("which suite? Pass --suite NAME; rc-agents bench suites lists them")
    import torch

    from rc_agents import packaged
    from rc_agents.benchmarks import stand_ins as tiny
    from rc_agents.benchmarks import suite as suites
    from rc_agents.benchmarks.runner import Run

    if threads:
        torch.set_num_threads(threads)
    whole = suites.load(suite)
    if stand_ins:
        whole = tiny.suite(whole)
    chosen = suites.chosen(whole, settings or (), methods or (), seeds or ())
    name = f"{Path(suite).stem}-stand-ins" if stand_ins else Path(suite).stem
    folder = results_folder(name, output)
    made = Run(
        suite=chosen,
        whole=whole,
        output=folder,
        folder=kept or packaged.cache_dir() / "bench",
        device=device,
        minutes=minutes,
        say=typer.echo,
    )
    found = {"suite": name, "path": str(folder)}
    if list_cells:
        _say_states(made, found if as_json else None)
        return
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        failed = made()
    if as_json:
        print(json.dumps(found | {"cells": made.outcomes, "failed": failed}))
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)
    if not as_json:
        typer.echo(f"done: {folder}; report: rc-agents bench report --suite {suite}")


def _say_states(made: Any, found: dict[str, str] | None) -> None:
    """Prints every cell's state: one a line, or as one JSON object behind what is `found` of the suite."""
    if found is not None:
        print(json.dumps(found | {"cells": dict(made.states())}))
        return
    for name, state in made.states():
        typer.echo(f"{name}: {state}")


@bench.command("suites")
def list_suites(as_json: AsJson = False) -> None:
    """Lists the suites that come with the package."""
    from rc_agents.benchmarks import suite as suites

    rows = []
    for name in suites.names():
        found = suites.load(name)
        cells = sum(len(part.methods) * len(part.seeds) for part in found.parts)
        rows.append({"name": name, "cells": cells, "about": found.about})
    if as_json:
        print(json.dumps({"suites": rows}))
        return
    for row in rows:
        typer.echo(f"{row['name']:14} {row['cells']:4} cells  {row['about']}")


@bench.command()
def report(
    suite: SuiteName = None,
    output: Output = None,
    png: Annotated[bool, typer.Option(help="Draw PNGs too; needs matplotlib.")] = True,
    as_json: AsJson = False,
) -> None:
    """Writes report.md, report.html and plots from the results' JSON alone."""
    from rc_agents.benchmarks import suite_report

    written = suite_report.write(_folder(suite, output), png=png)
    if as_json:
        print(json.dumps({"paths": [str(path) for path in written]}))
        return
    for path in written:
        if path.suffix != ".png":
            typer.echo(path)


@bench.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A method, or a folder of results.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one of the same sort.")],
    suite: SuiteName = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Says how A differs from B: paired bootstrap over seeds and items, in every measure that both have."""
    from rc_agents.benchmarks import compare as comparing

    if Path(a).is_dir() and Path(b).is_dir():
        rows = comparing.folders(Path(a), Path(b))
    else:
        rows = comparing.methods(_folder(suite, output), a, b)
    if as_json:
        print(json.dumps({"a": a, "b": b, "rows": [asdict(row) for row in rows]}))
        return
    typer.echo(comparing.table(rows), nl=False)


def _folder(suite: str | None, output: Path | None) -> Path:
    if suite is None and output is None:
        raise DataError("which results? Pass --suite NAME or --output DIR")
    return results_folder(Path(suite or "").stem, output)
