"""The subcommands, and what holds for all of them: one line for an error, quiet libraries."""

from __future__ import annotations

import functools
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import transformers
import typer

from rc_agents import RCError, __version__

from .bench import bench
from .chat import chat
from .demo import demo
from .doctor import doctor
from .eval import evaluate
from .generate import generate
from .graph import graph
from .info import info
from .node import node
from .serve import serve
from .solve import solve
from .specialize import specialize
from .train import train

PROGRAM = "rc-agents"
EXTRAS = {
    "datasets": "data",
    "gguf": "gguf",
    "langchain_core": "langchain",
    "lm_eval": "eval",
    "llguidance": "structured",
    "matplotlib": "plots",
    "peft": "train",
    "simple_icd_10_cm": "train",
    "uvicorn": "serve",
}
"""Module that may be missing -> the extra that brings it."""

app = typer.Typer(
    name=PROGRAM,
    help="Couple frozen language models into one, and talk to it.",
    epilog="Exit codes: 0 done, 2 something to mend (one line says what), 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, doctor, info, generate, chat, serve, node, specialize, solve, train):
    app.command()(command)
app.command(name="eval")(evaluate)
app.add_typer(bench, name="bench")
app.add_typer(graph, name="graph")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere in the line.")
    ] = False,
) -> None:
    """Takes the options in front of a subcommand."""


def run(argv: Sequence[str]) -> int:
    """Runs one command line; returns the exit code."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for n, word in enumerate(words) if n >= end or word != "--debug"]
    _quiet_libraries()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _command()(words, prog_name=PROGRAM)
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else 0
        except (RCError, ImportError) as error:
            line = _line(error)
            if debug or line is None:
                traceback.print_exc()
            if line is not None:
                print(f"error: {line}", file=sys.stderr)
            return 1 if line is None else 2
    return 0


@functools.cache
def _command() -> Any:
    return typer.main.get_command(app)


def _line(error: Exception) -> str | None:
    """What a user reads of an error, None where it is nobody's fault but ours."""
    if isinstance(error, RCError):
        return " ".join(str(error).split())
    if type(error) is ImportError and error.name is None:
        return str(error)  # of one of our own doors, which names the command that mends it
    extra = EXTRAS.get((getattr(error, "name", None) or "").split(".")[0])
    return extra and f"{error.name} is not installed; run: pip install 'rc-agents[{extra}]'"  # type: ignore[attr-defined]


def _quiet_libraries() -> None:
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def _show_warning(message: Any, *place: Any, **more: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
