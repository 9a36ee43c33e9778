"""`rc-agents serve`."""

from __future__ import annotations

import copy
import ipaddress
import json
import os
import sys
from typing import Annotated, Any

import typer

from rc_agents.errors import ConfigError

from .models import MODEL_HELP, Anchor, DeviceMap, DType, Nodes, Specialists, opened

KEY = "RC_AGENTS_API_KEY"


def serve(
    model: Annotated[
        str | None, typer.Argument(help=f"{MODEL_HELP} Left out with --anchor.", show_default=False)
    ] = None,
    anchor: Anchor = None,
    specialist: Specialists = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; beyond loopback needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    name: Annotated[
        str, typer.Option(help="What the model is called; NAME:a+b picks specialists.")
    ] = "rc",
    api_key: Annotated[
        str | None,
        typer.Option(envvar=KEY, help="What clients send as a bearer token.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Answers side by side.")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="Answers that may wait; more get 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of an answer.")] = 4096,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt.")] = 32768,
    choices: Annotated[int, typer.Option(min=1, help="Answers to one request (n).")] = 8,
    body_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 1 << 20,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="For an answer, waiting included.")
    ] = 600.0,
    grace: Annotated[float, typer.Option(min=0.1, help="Seconds to finish when stopped.")] = 30.0,
    continuous: Annotated[
        bool,
        typer.Option(
            help="Answers join those that are being written at any token, where the models' caches allow it."
        ),
    ] = True,
    device_map: DeviceMap = None,
    dtype: DType = None,
    nodes: Nodes = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print address and models as one JSON line once it listens."),
    ] = False,
) -> None:
    """Serve an ensemble with OpenAI's API, and a chat page at /.

    For example:

    rc-agents serve my-ensemble

    RC_AGENTS_API_KEY=secret rc-agents serve package:demo --host 0.0.0.0 --port 8080
    """
    from rc_agents.adapters.server import Limits, create_app, server

    if not _is_loopback(host) and not api_key:
        raise ConfigError(
            f"--host {host} can be reached from other machines; set {KEY} (or --api-key) so that not everybody may ask"
        )
    limits = Limits(
        batch=batch,
        queue=queue,
        max_tokens=max_tokens,
        prompt_tokens=prompt_tokens,
        choices=choices,
        body_bytes=body_bytes,
        seconds=seconds,
        grace_seconds=grace,
        continuous=continuous,
    )
    options: dict[str, Any] = {"log_level": os.environ.get("UVICORN_LOG_LEVEL", "info")}
    with opened(model, anchor, specialist, device_map, dtype, nodes) as ensemble:
        app = create_app(ensemble, name=name, api_key=api_key, limits=limits)
        print(f"serving {name}: {', '.join(ensemble.names)}", file=sys.stderr)
        why = app.state.serving.batcher.refusal
        joins = "at any token" if why is None else f"when those that run have ended ({why})"
        print(f"answers join others {joins}", file=sys.stderr)
        if as_json:
            options |= told_as_json(app)
        server(app, host=host, port=port, **options).run()


def told_as_json(app: Any) -> dict[str, Any]:
    """Returns what a server takes to print address and models as one JSON line once it listens, and no more there."""

    def tell(url: str) -> None:
        print(json.dumps({"url": url, "models": app.state.serving.names}), flush=True)

    return {"told": tell, "log_config": _log_on_stderr()}


def _log_on_stderr() -> dict[str, Any]:
    """uvicorn's own log, whose lines about requests else go where the JSON goes."""
    from uvicorn.config import LOGGING_CONFIG

    found = copy.deepcopy(LOGGING_CONFIG)
    found["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
