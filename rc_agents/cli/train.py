"""`rc-agents train`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .models import MODEL_HELP, Anchor, DeviceMap, DType, Specialists, open_model


def train(
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="Texts, JSONL with prompts and completions, hf:NAME."),
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the trained ensemble and its run.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    anchor: Anchor = None,
    specialists: Specialists = None,
    topology: Annotated[
        str, typer.Option(help="unilateral, star_bilateral or multi_bilateral; with --anchor.")
    ] = "unilateral",
    sites: Annotated[int, typer.Option(help="Meeting points; with --anchor.")] = 5,
    gate: Annotated[str, typer.Option(help="fixed, scalar or token; with --anchor.")] = "token",
    only: Annotated[
        list[str] | None,
        typer.Option(help="Train this specialist's bridges alone; repeatable."),
    ] = None,
    warm_start_text: Annotated[
        str | None, typer.Option(help="Text for a ridge warm start of the bridges that train.")
    ] = None,
    warm_start_scale: Annotated[float, typer.Option(help="Factor on the ridge solution.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    learning_rate: Annotated[float, typer.Option(help="Peak, of the maps.")] = 1e-3,
    gate_learning_rate: Annotated[float, typer.Option(help="Peak, of gates and mix.")] = 1e-2,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    batch_size: Annotated[int, typer.Option(help="Pairs a batch.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of the longest pair.")] = 256,
    text_batch_size: Annotated[int, typer.Option(help="Blocks of text a batch.")] = 4,
    block_length: Annotated[int, typer.Option(help="Tokens of a block of text.")] = 128,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    retain: Annotated[
        str | None, typer.Option(help="General text on which to stay the frozen anchor.")
    ] = None,
    retain_weight: Annotated[float, typer.Option(help="Factor on that term.")] = 1.0,
    retain_positions: Annotated[
        int | None, typer.Option(help="Tokens of it that count in a batch; all by default.")
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(help="Teach this specialist's own distribution, or that of all: fused."),
    ] = None,
    distill_weight: Annotated[float, typer.Option(help="Factor on that term.")] = 1.0,
    distill_on: Annotated[str, typer.Option(help="pairs, texts or both.")] = "pairs",
    answer_weight: Annotated[float, typer.Option(help="Factor on the loss of pairs.")] = 1.0,
    text_weight: Annotated[float, typer.Option(help="Factor on the loss of texts.")] = 1.0,
    validation: Annotated[
        str | None, typer.Option(help="What to judge by; the best bridges on it are kept.")
    ] = None,
    validation_share: Annotated[
        float, typer.Option(help="Or split this share of DATA off, by hash of the prompt.")
    ] = 0.0,
    eval_steps: Annotated[int, typer.Option(help="Steps between looks; 0 for a tenth of all.")] = 0,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many looks without a new best.")
    ] = None,
    states: Annotated[
        Path | None,
        typer.Option(help="Keep the specialists' states here, so that they run once; unilateral."),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the models in bfloat16.")] = False,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Less memory for more time.")
    ] = False,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for none.")] = 0,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, to the same bits.")
    ] = False,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard or another reporter; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the data.")] = 0,
    device_map: DeviceMap = None,
    dtype: DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Train the bridges of an ensemble; every base stays frozen.

    For example:

    rc-agents train questions.jsonl trained --anchor package:smollm2-135m
    --specialist medical=package:smollm2-135m+package:medical-coding --retain notes/
    --validation-share 0.1 --patience 3 --save-steps 50

    The same line with --resume goes on after an interruption.
    """
    from rc_agents.training.bridges import TrainConfig
    from rc_agents.training.bridges import train as train_bridges

    config = TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        gate_learning_rate=gate_learning_rate,
        schedule=schedule,
        batch_size=batch_size,
        max_length=max_length,
        text_batch_size=text_batch_size,
        block_length=block_length,
        gradient_accumulation=gradient_accumulation,
        answer_weight=answer_weight,
        text_weight=text_weight,
        distill_from=distill,
        distill_weight=distill_weight,
        distill_on=distill_on,
        retain_weight=retain_weight,
        retain_positions=retain_positions,
        validation_share=validation_share,
        eval_steps=eval_steps,
        patience=patience,
        bf16=bf16,
        checkpoint_activations=checkpoint_activations,
        save_steps=save_steps,
        keep=keep,
        report_to=tuple(report_to or ()),
        seed=seed,
    )
    form = {"topology": topology, "sites": sites, "gate": gate}
    warm = None if warm_start_text is None else (warm_start_text, warm_start_scale)
    named = (model, anchor, specialists, device_map, dtype)
    with contextlib.redirect_stdout(sys.stderr):  # the trainer's own log
        ensemble, records = _opened(data, named, form, warm, only, output if resume else None)
        done = train_bridges(
            ensemble,
            records,
            output,
            config,
            retain=retain,
            validation=validation,
            resume=resume,
            states=states,
            only=only or None,
            progress=sys.stderr.isatty(),
        )
    if as_json:
        found = {"path": str(output), "steps": done.steps, "loss": done.loss}
        print(json.dumps(found | {"best_step": done.best_step, "evaluations": done.evaluations}))
        return
    print(
        f"{output}: {done.steps} steps in {done.seconds:.0f} s, loss {done.loss:.3f}, "
        f"{done.trained_parameters:,} parameters" + _judged(done.evaluations, done.best_step)
    )


def _opened(
    data: str,
    named: tuple[Any, ...],
    form: dict[str, Any],
    warm: tuple[str, float] | None,
    only: list[str] | None,
    resumed: Path | None,
) -> tuple[Any, Any]:
    """Reads the data, opens the ensemble and gives its bridges their start, unless a checkpoint has a later one."""
    from rc_agents.config import BridgeConfig
    from rc_agents.training import data as training_data
    from rc_agents.training.run_folder import has_checkpoint
    from rc_agents.training.warm_start import warm_start

    records = training_data.read(data)
    bridge = BridgeConfig(gate=form["gate"], start="zero" if warm is None else "ridge")
    ensemble = open_model(*named, topology=form["topology"], sites=form["sites"], bridge=bridge)
    if warm is not None and not (resumed is not None and has_checkpoint(resumed)):
        texts = [one.key for one in training_data.read(warm[0])]
        edges = [edge for edge in ensemble.edges if not only or set(edge) & set(only)]
        warm_start(ensemble, texts, edges=edges, scale=warm[1], progress=sys.stderr.isatty())
    return ensemble, records


def _judged(evaluations: list[dict[str, Any]], best_step: int) -> str:
    """Returns what the validation set says, nothing without one."""
    losses = {entry["step"]: entry["eval_loss"] for entry in evaluations}
    if not losses:
        return ""
    return f", validation loss {losses[best_step]:.3f} at step {best_step}"
