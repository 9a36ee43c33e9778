"""Letting specialists sleep while nobody hears them: what is asked for, what came of it, and where it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from .errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """When a specialist sleeps while tokens are decoded one by one, and when it is woken.

    It falls asleep behind a token at which every gate that it is heard through was shut, and is woken for a token at
    which one would be open. Gates that read their target alone tell that exactly; of those that read the sleeping
    source as well it is guessed, from the target as it is and the source as it was last.

    Args:
        threshold: gates at or below it count as shut, beside those that are exactly shut (`gate_floor`); 0 to 1.
        wake: a guessed gate above it, before any floor, wakes; 0 to 1. The lower, the fewer wakings are missed.
        certainty: where the others, without the sleeper, give no next token more than this probability, it is woken
            too, unless its gates tell exactly; 0 to 1. 0 asks nobody for that, 1 everybody at every token.
    """

    threshold: float = 0.0
    wake: float = 0.01
    certainty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("threshold", "wake", "certainty"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value <= 1
            ):
                raise ConfigError(f"{name} is a number from 0 to 1, got {value!r}")


@dataclass
class Spared:
    """What sleeping has spared so far.

    Attributes:
        tokens: decoded tokens of all rows at which a specialist was there to be heard, by name.
        skipped: those of them at which it slept, by name.
        caught_up: tokens that a woken specialist read at once, uncoupled, by name.
        repeated: passes that were taken back and run again because somebody was woken.
    """

    tokens: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    caught_up: Counter[str] = field(default_factory=Counter)
    repeated: int = 0

    @property
    def share(self) -> float:
        """Share of (token, specialist) pairs that were skipped; 0 where nothing was decoded."""
        return self.skipped.total() / max(1, self.tokens.total())


_SPARSE: ContextVar[tuple[object, Sparse, Spared] | None] = ContextVar(
    "rc_agents_sparse", default=None
)


@contextmanager
def sparing(owner: object, settings: Sparse) -> Iterator[Spared]:
    """Lets specialists of `owner` sleep inside the block, in this thread and context only; yields the counts."""
    spared = Spared()
    token = _SPARSE.set((owner, settings, spared))
    try:
        yield spared
    finally:
        _SPARSE.reset(token)


def current(owner: object) -> tuple[Sparse, Spared] | None:
    """Returns what holds for the passes of `owner` here, None for dense ones."""
    found = _SPARSE.get()
    return found[1:] if found is not None and found[0] is owner else None
