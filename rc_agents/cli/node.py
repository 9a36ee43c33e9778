"""`rc-agents node`."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rc_agents.errors import ConfigError
from rc_agents.nodes import Node, NodeSettings, address_of, connect, launched, read_secret
from rc_agents.service import GenerationParams, GenerationService

from .models import SECRET, DeviceMap, DType, by_name, place
from .serve import told_as_json


def node(
    model: Annotated[
        str,
        typer.Argument(
            help="A saved ensemble: folder, hub id or package:NAME.", show_default=False
        ),
    ],
    role: Annotated[
        str | None,
        typer.Option(help="anchor or specialist; left out under torchrun, whose rank tells."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The specialist that runs here.")] = None,
    to: Annotated[
        str | None,
        typer.Option("--connect", metavar="HOST:PORT", help="Where the anchor's process listens."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where this process listens; beyond loopback needs a secret. "
            "[anchor: 127.0.0.1:29400, specialist: 127.0.0.1 and any port]",
        ),
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(metavar="HOST", help="How other specialists reach this one.")
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(envvar=SECRET, help="A file with the secret that all processes share."),
    ] = None,
    deadline: Annotated[
        float, typer.Option(help="Seconds without a sign after which a process counts as lost.")
    ] = 10.0,
    deadline_per_token: Annotated[
        float, typer.Option(help="Seconds more for each token of a pass.")
    ] = 0.02,
    wire: Annotated[
        str, typer.Option(help="How states cross, as the anchor says: exact, bfloat16 or int8.")
    ] = "exact",
    patience: Annotated[
        float, typer.Option(help="Seconds to wait for the others to come; 0 for ever.")
    ] = 120.0,
    once: Annotated[
        bool, typer.Option("--once", help="A specialist ends when its anchor says goodbye.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="The anchor answers this, and ends.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message; answer by the chat template.")
    ] = False,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Without --prompt the anchor serves OpenAI's API here."
        ),
    ] = 8000,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of the answer.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of this process.")] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the answer and its counts, or where it is served."),
    ] = False,
    device_map: DeviceMap = None,
    dtype: DType = None,
) -> None:
    """Run one model of an ensemble in this process, beside the others in theirs.

    For example, in two terminals or on two machines:

    rc-agents node my-ensemble --role specialist --name medical --connect 127.0.0.1:29400

    rc-agents node my-ensemble --role anchor --prompt "A fever is"

    torchrun --nproc-per-node 2 --no-python rc-agents node my-ensemble --prompt "A fever is"
    """
    if threads is not None:
        torch.set_num_threads(threads)
    logging.basicConfig(
        level=os.environ.get("RC_AGENTS_LOG", "WARNING").upper(), format="%(message)s"
    )
    settings = NodeSettings(
        deadline=deadline,
        deadline_per_token=deadline_per_token,
        wire=wire,
        secret=b"" if secret_file is None else read_secret(secret_file),
    )
    options = {"device_map": by_name(device_map, place), "dtype": by_name(dtype, str)}
    options = {key: value for key, value in options.items() if value is not None}
    wait = math.inf if patience == 0 else patience
    if role == "specialist":
        _serve(model, name, to, listen, advertise, settings, wait, once, options)
        return
    ensemble: Any
    if role == "anchor":
        for option, value in (("--name", name), ("--connect", to), ("--advertise", advertise)):
            if value is not None:
                raise ConfigError(f"{option} is a specialist's; leave it out with --role anchor")
        ensemble = connect(
            model, listen=listen or "127.0.0.1", settings=settings, wait=wait, **options
        )
    elif role is None and "RANK" in os.environ:
        ensemble = launched(model, settings=settings, host=advertise, wait=wait, **options)
        if ensemble is None:
            return
    else:
        raise ConfigError(
            f"--role is anchor or specialist, got {role!r}; without a role, start this with torchrun"
        )
    try:
        _use(ensemble, prompt, chat, max_new_tokens, port, as_json)
    finally:
        ensemble.elsewhere.close()


def _serve(
    model: str,
    name: str | None,
    to: str | None,
    listen: str | None,
    advertise: str | None,
    settings: NodeSettings,
    patience: float,
    once: bool,
    options: dict[str, Any],
) -> None:
    if name is None or to is None:
        raise ConfigError("a specialist needs --name NAME and --connect HOST:PORT")
    anchor = address_of(to)
    own = address_of(listen or "127.0.0.1", default_port=0)
    one = Node(model, name, settings=settings, listen=own, advertise=advertise, **options)
    print(f"{name}: loaded, joining {to}", file=sys.stderr)
    try:
        one.serve(anchor, patience=patience, once=once)
    finally:
        one.close()


def _use(
    ensemble: Any,
    prompt: str | None,
    chat: bool,
    max_new_tokens: int | None,
    port: int,
    as_json: bool,
) -> None:
    """What the anchor's process does once all are there: answers a prompt, or serves."""
    if prompt is None:
        from rc_agents.adapters.server import create_app, server

        app = create_app(ensemble)
        told = told_as_json(app) if as_json else {}
        server(app, host="127.0.0.1", port=port, log_level="info", **told).run()
        return
    asked: Any = [{"role": "user", "content": prompt}] if chat else prompt
    params = GenerationParams(max_new_tokens=max_new_tokens)
    result = GenerationService(ensemble).generate(asked, params)
    print(json.dumps(asdict(result), ensure_ascii=False) if as_json else result.text)
