"""What a schedule is given, and how it reports a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from ..backbone import accepted_arguments
from ..errors import ModelRunError, RCError

if TYPE_CHECKING:
    from ..cache import CoupledCache
    from .coupled_pass import CoupledPass

LOST: ContextVar[Mapping[str, str]] = ContextVar("rc_agents_lost", default=MappingProxyType({}))
"""Models of other processes that took no part in the last pass of this context, and why."""

Meet = Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]]
"""(site, every model's hidden states by name) -> the updated states by name, each to be asked for once."""


Schedule = Callable[[Sequence["Stream"], int, Meet], dict[str, Any]]
"""(every model's part, number of sites, the exchange) -> what each forward returned, by name."""


NO_LOGITS = slice(0, 0)
"""The positions at which a model that only speaks needs logits: none, so its output layer costs nothing.

No tensor: in a model that lies on several devices it would be carried to another one than the states.
"""


@dataclass(frozen=True)
class Call:
    """What a model's own `forward` is called with.

    Args:
        arguments: by name.
        keep: the positions whose logits are wanted: the last so many, 0 for all, a tensor of positions, or `NO_LOGITS`.
    """

    arguments: Mapping[str, Any]
    keep: int | slice | Tensor = 0

    def of(self, model: PreTrainedModel) -> Any:
        """Returns what the model gives."""
        trims = "logits_to_keep" in accepted_arguments(model)
        extra = {"logits_to_keep": self.keep} if trims else {}
        output = model(**self.arguments, **extra, return_dict=True)
        if not trims:
            kept = slice(-self.keep, None) if isinstance(self.keep, int) else self.keep
            output.logits = output.logits[:, kept]
        return output


@dataclass(frozen=True)
class Stream:
    """One model's part of a pass: its name, a call of its own `forward`, and what that is called with."""

    name: str
    run: Callable[[], Any]
    call: Call | None = None


class Elsewhere(Protocol):
    """Where the models run that this process does not hold: what a pass needs to know of it.

    Attributes:
        trains: whether this process holds copies of all bridges, to train them.
    """

    trains: bool

    def run(
        self, make: Callable[[], CoupledPass], memory: CoupledCache
    ) -> tuple[CoupledPass, dict[str, Any]]:
        """Runs a pass, once more without them where models are lost; returns it and each forward's output."""

    def catch_up(self, name: str, past: int, call: Call) -> None:
        """Shows one model tokens that it missed, uncoupled."""

    def lens(self, name: str) -> Callable[[Tensor], Tensor]:
        """Returns what asks for a model's logits behind states of its own, (N, D) -> (N, V)."""

    def takes_branches(self, name: str) -> bool:
        """Whether a model can run branch tokens."""


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
