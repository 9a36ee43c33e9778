"""The command line, `rc-agents`: one thin function a subcommand, one file each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    import typer  # noqa: F401
except ImportError:
    app = None
else:
    from .app import app, run  # type: ignore[assignment]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `rc-agents`; exits with 0, with 2 for what a user can mend, or with 130 after Ctrl-C.

    Args:
        argv: the words behind the program's name, `sys.argv`'s by default.
    """
    if app is None:
        sys.exit("rc-agents on the command line needs typer; run: pip install 'rc-agents[cli]'")
    sys.exit(run(sys.argv[1:] if argv is None else argv))
