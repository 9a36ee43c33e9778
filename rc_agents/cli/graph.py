"""`rc-agents graph train|eval|node|show`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rc_agents.errors import ConfigError
from rc_agents.nodes import NodeSettings, address_of, read_secret
from rc_agents.nodes.settings import PORT

from .graph_show import show
from .models import SECRET, DeviceMap, DType, by_name, place

graph = typer.Typer(
    help="Feedforward graphs of frozen models through a shared latent space.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Asked = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="arc_challenge, openbookqa, mmlu, or JSONL with question, choices, label.",
    ),
]
Saved = Annotated[str, typer.Argument(help="A trained graph: folder or hub id.")]
Processes = Annotated[
    list[str] | None,
    typer.Option(
        "--process", metavar="NODE=HOST:PORT", help="A node that `rc-agents graph node` runs."
    ),
]
Secret = Annotated[
    Path | None,
    typer.Option("--secret-file", envvar=SECRET, help="A file with the secret of its processes."),
]


@graph.command()
def train(
    config: Annotated[
        Path,
        typer.Argument(
            help="The graph: a file of YAML, or `published`: the article's five models."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the trained graph.")],
    questions: Asked = "arc_challenge",
    validation: Annotated[int, typer.Option(min=1, help="Questions to judge by.")] = 200,
    count: Annotated[
        int | None, typer.Option("--train", min=1, help="Training questions; all by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    learning_rate: Annotated[float, typer.Option(help="Peak for edges and output.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Questions a batch.")] = 32,
    ridge: Annotated[bool, typer.Option("--ridge", help="Start the edges in closed form.")] = False,
    keep: Annotated[
        Path | None,
        typer.Option(help="Keep states that never change here, so that lower blocks run once."),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many looks without a new best.")
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for none.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, to the same bits.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the start and of the order of the data.")] = 0,
    process: Processes = None,
    secret_file: Secret = None,
    device_map: DeviceMap = None,
    dtype: DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Train the edges and the output of a graph on multiple-choice questions; every model stays frozen.

    For example:

    rc-agents graph train graph.yaml trained --questions arc_challenge --keep states --ridge
    """
    from rc_agents import graph as graphs

    settings = graphs.GraphTrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        patience=patience,
        save_steps=save_steps,
        seed=seed,
    )
    taught, judged = _parts(questions, count, validation, seed)
    with contextlib.redirect_stdout(sys.stderr):
        options = _where(device_map, dtype) | _elsewhere(process, secret_file)
        given: Any = config
        if str(config) == "published" and not config.exists():
            most = max(len(one.choices) for one in (*taught, *judged))
            given = graphs.published(choices=max(4, most))
        built = graphs.build(given, seed=seed, **options)
        if ridge and not resume:
            graphs.ridge_start(built, graphs.ask(built.config, taught))
        done = graphs.train(
            built,
            taught,
            output,
            settings,
            validation=judged,
            keep=keep,
            resume=resume,
            progress=sys.stderr.isatty(),
        )
        temperature = graphs.calibrate(built, judged)
        built.save_pretrained(output)
    found: dict[str, Any] = {"path": str(output), "steps": done.steps, "loss": done.loss}
    found |= {"best_step": done.best_step, "temperature": temperature}
    if as_json:
        print(json.dumps(found | {"evaluations": done.evaluations}))
        return
    print(
        f"{output}: {done.steps} steps in {done.seconds:.0f} s, loss {done.loss:.3f}, best at step {done.best_step}, "
        f"{done.trained_parameters:,} parameters"
    )


@graph.command(name="eval")
def evaluate(
    model: Saved,
    questions: Asked = "arc_challenge",
    limit: Annotated[int | None, typer.Option(min=1, help="First so many questions.")] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Also answer once without each node.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a pass.")] = 16,
    process: Processes = None,
    secret_file: Secret = None,
    device_map: DeviceMap = None,
    dtype: DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Answer test questions: accuracy with Wilson's interval, calibration, routing, and what each node is worth."""
    from rc_agents import graph as graphs
    from rc_agents import questions as sources

    options = _where(device_map, dtype) | _elsewhere(process, secret_file)
    loaded = graphs.load(model, **options)
    named = questions in sources.SOURCES
    asked = sources.load(questions).test if named else sources.read(questions)
    found = graphs.report(loaded, asked[:limit], batch_size=batch_size, leave_one_out=leave_one_out)
    low, high = found.interval
    if as_json:
        print(json.dumps(found.to_dict() | {"interval": [low, high]}))
        return
    print(
        f"right       {sum(found.right)} of {found.count}, {found.accuracy:.1%} ({low:.1%} to {high:.1%})"
    )
    print(f"calibration {found.calibration:.3f}")
    for name, share in found.routing.items():
        print(f"routing     {name} {share:.1%}")
    for name in found.lost:
        print(f"lost        {name}: some or all of this was answered without it", file=sys.stderr)
    for name, accuracy in found.without.items():
        print(f"without     {name} {accuracy:.1%}")


@graph.command()
def node(
    model: Annotated[str, typer.Argument(help="A graph's file of YAML, or a trained graph.")],
    name: Annotated[str, typer.Option(help="The node that runs here.")],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Beyond loopback needs a secret.")
    ] = f"127.0.0.1:{PORT}",
    secret_file: Secret = None,
    device_map: DeviceMap = None,
    dtype: DType = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print name and address as one JSON line.")
    ] = False,
) -> None:
    """Run one node of a graph here, for graphs that name this process by --process; Ctrl-C ends it.

    For example:

    rc-agents graph node graph.yaml --name medical --listen 127.0.0.1:29400
    """
    from rc_agents import graph as graphs

    secret = read_secret(secret_file) if secret_file else b""
    with contextlib.redirect_stdout(sys.stderr):
        server = graphs.NodeServer(
            model,
            name,
            listen=address_of(listen),
            settings=NodeSettings(secret=secret),
            **_where(device_map, dtype),
        )
    host, port = server.address
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    told = {"node": name, "address": address}
    print(json.dumps(told) if as_json else f"{name} listens on {address}", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()


def _elsewhere(processes: Sequence[str] | None, secret_file: Path | None) -> dict[str, Any]:
    """Returns where the nodes of other processes are."""
    found: dict[str, str] = {}
    for one in processes or ():
        name, equals, address = one.partition("=")
        if not equals or not name or not address or name in found:
            raise ConfigError(f"--process takes NODE=HOST:PORT, once a node, got {one!r}")
        found[name] = address
    secret = read_secret(secret_file) if secret_file else b""
    return {"processes": found, "settings": NodeSettings(secret=secret)}


def _where(device_map: str | None, dtype: str | None) -> dict[str, Any]:
    return {"device_map": by_name(device_map, place), "dtype": by_name(dtype, str)}


def _parts(
    name: str, count: int | None, validation: int, seed: int
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Returns training and validation questions, of a data set or of a file."""
    from rc_agents import questions as sources

    if name in sources.SOURCES:
        found = sources.load(name, seed=seed, train=count, validation=validation)
        return found.train, found.validation
    found = sources.parts(sources.read(name), [], seed=seed, train=count, validation=validation)
    return found.train, found.validation


graph.command()(show)
