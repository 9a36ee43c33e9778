"""`rc-agents demo`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("reports/demo"),
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Measure on everything held out, some twenty minutes on two cores."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves torch's own number.")] = 0,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline", help="Bar the Hugging Face hub, which the demo has no need of anyway."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was measured as JSON; the show on stderr.")
    ] = False,
) -> None:
    """Watch three frozen models answer as one, and what that is worth: accuracy, perplexity, time.

    The models and texts come with installed packages; where one is missing, a line says which
    command installs it.
    """
    from huggingface_hub import constants

    from rc_agents.demo.run import DemoConfig, run

    constants.HF_HUB_OFFLINE |= offline  # the variable of that name was read at import
    config = DemoConfig(output=output, seed=seed, threads=threads)
    config = DemoConfig.full(output, seed, threads) if full else config
    if not as_json:
        run(config)
        return
    with contextlib.redirect_stdout(sys.stderr):
        found = run(config)
    print(json.dumps(found | {"path": str(output)}))
