"""`rc-agents eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rc_agents.errors import InputError

from .generate import Chosen, Strength
from .models import (
    MODEL_HELP,
    Anchor,
    DeviceMap,
    DType,
    Specialists,
    by_name,
    names,
    number,
    open_model,
)


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help=f"{MODEL_HELP} Left out with --anchor.", show_default=False)
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="lm-eval's tasks; `--tasks list` shows those without a hub."
        ),
    ] = "",
    anchor: Anchor = None,
    specialist: Specialists = None,
    specialists: Chosen = None,
    strength: Strength = None,
    limit: Annotated[
        float | None, typer.Option(help="First so many items of a task; below 1 a share of them.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples before each item; by default as the task says."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Items a batch.")] = 8,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the anchor's chat template.")
    ] = False,
    include: Annotated[
        Path | None, typer.Option(help="A folder with more tasks in lm-eval's form.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the results as JSON here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device_map: DeviceMap = None,
    dtype: DType = None,
) -> None:
    """Run tasks of lm-eval's harness on an ensemble.

    For example:

    rc-agents eval my-ensemble --tasks openbookqa_local,boolq_local --limit 100

    rc-agents eval my-ensemble --tasks hellaswag --specialists none
    """
    from rc_agents.adapters.lm_eval import LOCAL_TASKS, EnsembleLM, report
    from rc_agents.adapters.lm_eval import evaluate as run

    if tasks == "list":
        print(json.dumps({"tasks": list(LOCAL_TASKS)}) if as_json else "\n".join(LOCAL_TASKS))
        return
    if limit is not None and limit <= 0:
        raise InputError(f"--limit is a number above 0, got {limit}")
    asked = [name.strip() for name in tasks.split(",") if name.strip()]
    report.find(asked, include)  # before a model is loaded
    lm = EnsembleLM(
        open_model(model, anchor, specialist, device_map, dtype),
        specialists=names(specialists),
        strength=by_name(strength, number),
        batch_size=batch_size,
    )
    results = run(
        lm,
        asked,
        include=include,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat,
        log_samples=False,
    )
    text = report.to_json(results)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    print(text if as_json else report.table(results))
