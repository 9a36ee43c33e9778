"""`rc-agents solve`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .models import MODEL_HELP, Anchor, DeviceMap, DType, Specialists, open_model


def solve(
    output: Annotated[Path, typer.Argument(help="Folder for the ensemble.")],
    knows: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=DATA",
            help="Prompts and answers, or texts, that a specialist knows; repeatable.",
        ),
    ],
    retain: Annotated[str, typer.Option(help="General text, on which nobody shall speak.")],
    own: Annotated[
        Path | None,
        typer.Option(
            help="Prompts of the anchor's own, one a line (\\n breaks it); it answers by itself."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    anchor: Anchor = None,
    specialists: Specialists = None,
    penalty: Annotated[
        float, typer.Option(help="On the gates' weights; more for more silence.")
    ] = 1e-3,
    quiet: Annotated[
        float, typer.Option(help="Share of --retain and --own at which gates must be shut.")
    ] = 0.9995,
    states: Annotated[
        Path | None, typer.Option(help="Keep the models' states here, for another try.")
    ] = None,
    device_map: DeviceMap = None,
    dtype: DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Solve for the bridges of specialists instead of training them; every base stays frozen.

    For example:

    rc-agents solve coupled --anchor package:smollm2-135m
    --specialist words=package:smollm2-135m+words/ --knows words=questions.jsonl
    --retain notes/ --own prompts.txt
    """
    from rc_agents.errors import InputError
    from rc_agents.training import data
    from rc_agents.training.solve import BRIDGE, check_solvable, own_answers, solve_bridges

    each = dict(_named(one) for one in knows)
    if len(each) < len(knows):
        raise InputError(f"--knows names each specialist once, got {', '.join(knows)}")
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise InputError(f"{output} is not empty; name a new folder")
    prompts = _lines(own)
    known = {name: data.read(place) for name, place in each.items()}
    silent: list[Any] = list(data.read(retain))
    form = {} if anchor is None else {"topology": "unilateral", "sites": 1, "bridge": BRIDGE}
    ensemble = open_model(model, anchor, specialists, device_map, dtype, **form)
    check_solvable(ensemble, list(known))
    bars = sys.stderr.isatty()
    silent += own_answers(ensemble, prompts, progress=bars)
    with tempfile.TemporaryDirectory(prefix="rc-agents-") as scratch:
        solved = solve_bridges(
            ensemble,
            known,
            silent,
            states or scratch,
            penalty=penalty,
            quiet=quiet,
            progress=bars,
        )
    ensemble.save_pretrained(output)
    gates = {key: vars(fit) for key, fit in solved.gates.items()}
    if as_json:
        found = {"path": str(output), "carriers": dict(solved.carriers), "gates": gates}
        print(json.dumps(found | {"seconds": round(solved.seconds, 1)}))
        return
    for name, carrier in solved.carriers.items():
        shown = next(fit for key, fit in solved.gates.items() if key.startswith(f"{name}__"))
        print(
            f"{name}: map by {carrier}; its gate speaks at {100 * shown.open:.1f} % of {shown.positives} answer "
            f"tokens, is shut at {100 * shown.shut:.2f} % of {shown.negatives} others"
        )
    print(f"{output}: solved in {solved.seconds:.0f} s")


def _named(text: str) -> tuple[str, str]:
    from rc_agents.errors import InputError

    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise InputError(f"--knows takes NAME=DATA, got {text!r}")
    return name, place


def _lines(path: Path | None) -> list[str]:
    from rc_agents.errors import InputError

    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--own {path} cannot be read: {error}") from error
    return [line.replace("\\n", "\n") for line in lines if line.strip()]
