"""`rc-agents generate`."""

from __future__ import annotations

import json
import mimetypes
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rc_agents.errors import InputError
from rc_agents.service import GenerationParams, GenerationService

from .models import (
    MODEL_HELP,
    Anchor,
    DeviceMap,
    DType,
    Nodes,
    Specialists,
    by_name,
    names,
    number,
    opened,
)

MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="At most so many tokens; by default the model's own limit, or 256."),
]
Temperature = Annotated[
    float | None, typer.Option(help="0 for the likeliest token; by default as the model says.")
]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the tokens that have this probability.")
]
TopK = Annotated[int | None, typer.Option(help="Sample from so many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="Makes samples repeatable.")]
Chosen = Annotated[
    str | None,
    typer.Option("--specialists", metavar="A,B", help="Who takes part: names, all, or none."),
]
Strength = Annotated[
    str | None,
    typer.Option(help="Factor on the bridges: 0.5, or by specialist: medical=0.5,code=2."),
]


Shown = Annotated[
    list[Path] | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="A picture, or a sound (WAV), for the encoder that takes it; repeatable.",
    ),
]


def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]",
            help=f"{MODEL_HELP} Left out with --anchor. The prompt is read from stdin where it is missing or '-'.",
            show_default=False,
        ),
    ] = None,
    anchor: Anchor = None,
    specialist: Specialists = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    specialists: Chosen = None,
    strength: Strength = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message; answer by the chat template.")
    ] = False,
    show: Shown = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the text and its counts.")] = False,
    device_map: DeviceMap = None,
    dtype: DType = None,
    nodes: Nodes = None,
) -> None:
    """Go on from a text, or answer a message.

    For example:

    rc-agents generate seeing "What does the picture show? Answer:" --show picture.png

    rc-agents generate package:smollm2-135m "The capital of France is" --max-new-tokens 8

    echo "What is a fever?" | rc-agents generate my-ensemble --chat --stream --specialists medical
    """
    model, text = _model_and_prompt(words or [], anchor)
    params = GenerationParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or (),
        specialists=names(specialists),
        strength=by_name(strength, number),
    )
    if stream and as_json:
        raise InputError("--stream and --json do not go together")
    prompt = text if text is not None else _read_stdin()
    parts = [part_of(one) for one in show or ()]
    with opened(model, anchor, specialist, device_map, dtype, nodes) as ensemble:
        service = GenerationService(ensemble)
        message = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
        asked = service.render([message]) if chat else service.encode(prompt, parts)
        if not stream:
            result = service.generate(asked, params)
            print(json.dumps(asdict(result), ensure_ascii=False) if as_json else result.text)
            return
        with service.stream(asked, params) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print()


def part_of(file: Path) -> dict[str, Any]:
    """Returns the part of a message that shows a file: a sound by its name's end, or a picture."""
    hears = (mimetypes.guess_type(file.name)[0] or "").startswith("audio/")
    kind = "audio" if hears else "image"
    return {"type": kind, kind: file}


def _model_and_prompt(words: list[str], anchor: str | None) -> tuple[str | None, str | None]:
    """Sorts the positional words: [MODEL] [PROMPT], the model only where no anchor is named."""
    room = 1 if anchor is not None else 2
    if len(words) > room:
        raise InputError(f"too many words: {words[room]!r}; put the prompt in quotes")
    if anchor is not None:
        model, text = None, words[0] if words else None
    else:
        model, text = words[0] if words else None, words[1] if len(words) == 2 else None
    return model, None if text == "-" else text


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise InputError("no prompt; pass one in quotes, or pipe it in")
    text = sys.stdin.read()
    return text.removesuffix("\n")
