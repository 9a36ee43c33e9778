"""What the processes of an ensemble are told: how long to wait, how states cross, what they share."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..execution.wire import check_wire

PORT = 29400
SHORTEST = 16  # bytes of a secret: whoever connects can try guesses of a weak one by himself


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """How the processes of one ensemble deal with each other.

    Args:
        deadline: seconds that a wait may take before the other process counts as lost.
        deadline_per_token: seconds more for each token of a pass, B x T, as long prompts take their time.
        join: seconds that a handshake may take.
        wire: how states cross, as the anchor says: "exact", "bfloat16" or "int8".
        secret: what proves that a process belongs to the ensemble; needed beyond loopback.
    """

    deadline: float = 10.0
    deadline_per_token: float = 0.02
    join: float = 30.0
    wire: str = "exact"
    secret: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        for name in ("deadline", "join"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} is a number of seconds above 0, got {getattr(self, name)!r}"
                )
        if not self.deadline_per_token >= 0:
            raise ConfigError(f"deadline_per_token is 0 or more, got {self.deadline_per_token!r}")
        check_wire(self.wire)


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of `from_pretrained`'s options that say where on the hub a checkpoint lies."""
    return {name: options[name] for name in ("revision", "token", "cache_dir") if name in options}


def address_of(text: str, default_port: int | None = PORT) -> tuple[str, int]:
    """Returns host and port of "host:port", "host" or "[v6]:port"; raises `ConfigError` for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or (host.count(":") and not host.endswith("]")):
        host, port = text, "" if default_port is None else str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"expected an address such as 127.0.0.1:{PORT}, got {text!r}")
    return host, int(port)


def listener(address: tuple[str, int], secret: bytes) -> socket.socket:
    """Returns a socket that listens; beyond loopback only with a secret.

    Raises:
        ConfigError: no secret, or an address that cannot be had.
    """
    if len(secret) < SHORTEST and not _is_loopback(address[0]):
        raise ConfigError(
            f"listening on {address[0]} is open to the network: give every process the same secret "
            f"of at least {SHORTEST} bytes, or listen on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        return socket.create_server(address, family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address[0]}:{address[1]}: {error.strerror or error}; name another address"
        ) from error


def read_secret(file: str | Path) -> bytes:
    """Returns the secret that a file holds, without white space around it; raises `ConfigError` for a short one."""
    try:
        secret = Path(file).expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"the secret's file {file} cannot be read: {error.strerror}") from error
    if len(secret) < SHORTEST:
        raise ConfigError(
            f"the secret in {file} has {len(secret)} bytes, at least {SHORTEST} are needed; "
            "make one with: openssl rand -hex 32"
        )
    return secret


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
