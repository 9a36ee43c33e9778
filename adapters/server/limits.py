"""What a server lets in."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rc_agents.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server lets in; a request beyond it is refused with the number.

    Args:
        batch: rows that are answered side by side.
        queue: rows that wait; more are refused with 429.
        max_tokens: new tokens of an answer.
        prompt_tokens: of a prompt; the models' contexts hold besides.
        choices: answers to one request (`n`, or prompts in a list).
        body_bytes: of a request.
        seconds: from a request's arrival to the end of its answer; a request may ask for less with `timeout`.
        grace_seconds: for running answers when the server stops.
        continuous: whether rows join those that run at any token, where the models' caches allow it.
    """

    batch: int = 8
    queue: int = 64
    max_tokens: int = 4096
    prompt_tokens: int = 32768
    choices: int = 8
    body_bytes: int = 1 << 20
    seconds: float = 600.0
    grace_seconds: float = 30.0
    continuous: bool = True

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name != "continuous" and not value > 0:
                raise ConfigError(f"the limit {one.name} is above 0, got {value!r}")
