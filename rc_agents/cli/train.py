"""`rc-agents train`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .models import MODEL_HELP, Anchor, DeviceMap, DType, Specialists, open_model


def train(
    data: Annotated[Path, typer.Argument(help="Texts or JSONL with prompts and completions.")],
    output: Annotated[Path, typer.Argument(help="Folder for the trained ensemble.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    anchor: Anchor = None,
    specialists: Specialists = None,
    topology: Annotated[
        str, typer.Option(help="unilateral, star_bilateral or multi_bilateral; with --anchor.")
    ] = "unilateral",
    sites: Annotated[int, typer.Option(help="Meeting points; with --anchor.")] = 5,
    gate: Annotated[str, typer.Option(help="fixed, scalar or token; with --anchor.")] = "token",
    retain: Annotated[
        Path | None, typer.Option(help="General text on which to stay the frozen anchor.")
    ] = None,
    warm_start_text: Annotated[
        Path | None, typer.Option(help="Text for a ridge warm start of the bridges.")
    ] = None,
    warm_start_scale: Annotated[float, typer.Option(help="Factor on the ridge solution.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    learning_rate: Annotated[float, typer.Option(help="Peak, of the maps.")] = 1e-3,
    gate_learning_rate: Annotated[float, typer.Option(help="Peak, of gates and mix.")] = 1e-2,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 16,
    retain_weight: Annotated[float, typer.Option(help="Factor on the retention term.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the order of the data.")] = 0,
    device_map: DeviceMap = None,
    dtype: DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Train the bridges of an ensemble; every base stays frozen.

    For example:

    rc-agents train questions.jsonl trained --anchor package:smollm2-135m
    --specialist medical=package:smollm2-135m+package:medical-coding --retain notes/
    """
    from rc_agents.config import BridgeConfig
    from rc_agents.training import data as training_data
    from rc_agents.training.bridges import TrainConfig
    from rc_agents.training.bridges import train as train_bridges
    from rc_agents.training.warm_start import warm_start

    config = TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        gate_learning_rate=gate_learning_rate,
        batch_size=batch_size,
        retain_weight=retain_weight,
        seed=seed,
    )
    records = training_data.read(data)
    start = "ridge" if warm_start_text is not None else "zero"
    form = {
        "topology": topology,
        "sites": sites,
        "bridge": BridgeConfig(gate=gate, start=start),  # type: ignore[arg-type]
    }
    ensemble = open_model(model, anchor, specialists, device_map, dtype, **form)
    if warm_start_text is not None:
        texts = [record.key for record in training_data.read(warm_start_text)]
        warm_start(ensemble, texts, scale=warm_start_scale)
    with contextlib.redirect_stdout(sys.stderr):  # the trainer's own log
        done = train_bridges(ensemble, records, output, config, retain=retain)
    if as_json:
        print(json.dumps({"path": str(output), "steps": done.steps, "loss": done.loss}))
        return
    print(
        f"{output}: {done.steps} steps in {done.seconds:.0f} s, loss {done.loss:.3f}, "
        f"{done.trained_parameters:,} parameters"
    )
