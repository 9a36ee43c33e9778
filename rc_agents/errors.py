"""Every error a user can cause, each a `ValueError` with one line: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RCError(Exception):
    """Base of every error that rc_agents raises on purpose."""


class ConfigError(RCError, ValueError):
    """A setting has a wrong type, an unknown name or contradicts another setting."""


class ModelError(RCError, ValueError):
    """A model cannot be loaded or cannot take part in a coupling."""


class PackageError(RCError, ValueError):
    """A `package:` model or text is unknown, not installed or damaged."""


class CheckpointError(RCError, ValueError):
    """A saved ensemble is missing, foreign, damaged or does not fit its bases."""


class TokenError(RCError, ValueError):
    """The tokenizers at hand do not allow the alignment that was asked for."""


class InputError(RCError, ValueError):
    """A call got inputs it cannot work with."""


class ContextError(InputError):
    """A text is longer than one of its models takes."""


class TrainingError(RCError, ValueError):
    """A training run is configured in a way that cannot work."""


class DataError(RCError, ValueError):
    """A data file is missing, empty or malformed."""


class ModelRunError(RCError, RuntimeError):
    """A model or a bridge failed inside a coupled pass; the message carries its name, `__cause__` the reason."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "known names: a, b; did you mean 'b'?" for a look-up error."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"known: {', '.join(names) or 'none'}{hint}"
