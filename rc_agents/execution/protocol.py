"""What a schedule is given, and how it reports a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from ..errors import ModelRunError, RCError

Meet = Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]]
"""(site, every model's hidden states by name) -> the updated states by name, each to be asked for once."""


Schedule = Callable[[Sequence["Stream"], int, Meet], dict[str, Any]]
"""(every model's part, number of sites, the exchange) -> what each forward returned, by name."""


@dataclass(frozen=True)
class Stream:
    """One model's part of a pass: its name and a call of its own `forward`."""

    name: str
    run: Callable[[], Any]


def fail(name: str, error: BaseException) -> NoReturn:
    """Raises a model's failure under its name; our own errors keep their type, an interrupt goes through."""
    if isinstance(error, ModelRunError) or not isinstance(error, Exception):
        raise error
    message = f"model {name!r} failed in the coupled pass: {type(error).__name__}: {error}"
    kind = type(error) if isinstance(error, RCError) else ModelRunError
    raise kind(message) from error


def check_order(name: str, arrived: int, expected: int) -> None:
    """Raises unless a model that has arrived at one site was expected there."""
    if arrived < expected:
        raise ModelRunError(
            f"model {name!r} passes the block of site {arrived} more than once; its forward repeats blocks"
        )
    if arrived > expected:
        raise missed(name, expected)


def missed(name: str, site: int) -> ModelRunError:
    """The error for a model whose forward ended before it reached a site."""
    return ModelRunError(
        f"model {name!r} finished without passing the block of site {site}; its forward skips blocks"
    )
