"""`rc-agents specialize`."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def specialize(
    base: Annotated[
        str, typer.Argument(help="The model to teach: folder, hub id or package:NAME.")
    ],
    data: Annotated[
        Path, typer.Argument(help="What to teach: a text file, a folder of them, or JSONL.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the adapter.")],
    adapter: Annotated[
        Path | None,
        typer.Option(help="Go on from this LoRA adapter on the same base, in its own form."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 300,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Question-answer pairs a step.")] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens of the longest pair.")] = 256,
    text_batch_size: Annotated[int, typer.Option(help="Blocks of text a step.")] = 8,
    block_length: Annotated[int, typer.Option(help="Tokens of a block of text.")] = 128,
    frozen_blocks: Annotated[
        int, typer.Option(help="First blocks without an adapter; training them costs nothing.")
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the frozen base: auto, float32 or bfloat16.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the order and the adapter's start.")] = 0,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for none.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Teach a copy of a model a body of text or question-answer pairs: a specialist adapter, the base stays frozen.

    For example:

    rc-agents specialize package:smollm2-135m notes.jsonl medical --steps 200

    rc-agents chat --anchor package:smollm2-135m --specialist medical=package:smollm2-135m+medical
    """
    from rc_agents.training.specialize import SpecializeConfig
    from rc_agents.training.specialize import specialize as train

    config = SpecializeConfig(
        steps=steps,
        rank=rank,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        text_batch_size=text_batch_size,
        block_length=block_length,
        frozen_blocks=frozen_blocks,
        dtype=dtype,
        seed=seed,
        save_steps=save_steps,
    )
    with contextlib.redirect_stdout(sys.stderr):  # the trainer's own log
        done = train(
            base,
            data,
            output,
            config,
            adapter=adapter,
            resume=resume,
            progress=sys.stderr.isatty(),
        )
    if as_json:
        print(json.dumps(asdict(done) | {"path": str(done.path)}))
        return
    print(
        f"{done.path}: {done.steps} steps in {done.seconds:.0f} s, loss {done.loss:.3f}, "
        f"{done.trained_parameters:,} parameters"
    )
