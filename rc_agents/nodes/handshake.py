"""Two processes meet: each proves that it knows the secret, then both say what they are.

HMAC-SHA256 over fresh random numbers of both sides, so that nothing that was overheard can be used again. It proves who
is there when a link is made; it neither encrypts nor signs what follows. Across networks that are not trusted, run the
links through a tunnel (WireGuard, SSH).
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.metadata
import os
import socket
import time
from typing import Any

import torch
import transformers

from ..execution.wire import Channel, Frame, LinkError, NotYet, readable

PROTOCOL = 1
HELLO = b"rc_agents node 1\n"
SIZE = 32


def _proof(secret: bytes, side: bytes, *numbers: bytes) -> bytes:
    return hmac.new(secret, side + b"".join(numbers), hashlib.sha256).digest()


def greet(sock: socket.socket, secret: bytes, seconds: float) -> None:
    """The side that connects: proves itself, and checks the other.

    Raises:
        LinkError: another secret, or no process of ours.
    """
    end = time.monotonic() + seconds
    sock.settimeout(seconds)
    mine = os.urandom(SIZE)
    sock.sendall(HELLO + mine)
    theirs = _exactly(sock, 2 * SIZE, end)
    number, proof = theirs[:SIZE], theirs[SIZE:]
    if not hmac.compare_digest(proof, _proof(secret, b"accept", mine, number)):
        raise LinkError("the other process has another secret; give both the same")
    sock.sendall(_proof(secret, b"connect", mine, number))


def admit(sock: socket.socket, secret: bytes, seconds: float) -> None:
    """The side that was connected to: proves itself, and checks the other.

    Raises:
        LinkError: another secret, or no process of ours.
    """
    end = time.monotonic() + seconds
    sock.settimeout(seconds)
    first = _exactly(sock, len(HELLO) + SIZE, end)
    if not first.startswith(HELLO):
        raise LinkError("it is no process of an ensemble")
    theirs, number = first[len(HELLO) :], os.urandom(SIZE)
    sock.sendall(number + _proof(secret, b"accept", theirs, number))
    if not hmac.compare_digest(
        _exactly(sock, SIZE, end), _proof(secret, b"connect", theirs, number)
    ):
        raise LinkError("the other process has another secret; give both the same")


def _exactly(sock: socket.socket, count: int, end: float) -> bytes:
    data = b""
    while len(data) < count:
        try:
            sock.settimeout(max(0.001, end - time.monotonic()))
            part = sock.recv(count - len(data))
        except OSError as error:
            raise NotYet(f"the handshake failed: {error}") from error
        if not part:
            raise NotYet("the handshake failed: the other end closed the link (another secret?)")
        data += part
    return data


def versions() -> dict[str, str]:
    """Returns the versions that both ends should share."""
    return {
        "rc_agents": importlib.metadata.version("rc-agents"),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def disagreement(mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Returns why two processes cannot work together, None where they can.

    Args:
        mine, theirs: `protocol`, `ensemble` (its identity) and `versions`.
    """
    if theirs.get("protocol") != mine["protocol"]:
        return (
            f"it speaks protocol {theirs.get('protocol')}, this process {mine['protocol']}; "
            "install the same rc-agents"
        )
    if theirs.get("ensemble") != mine["ensemble"]:
        return (
            f"it has another ensemble ({str(theirs.get('ensemble'))[:12]}..., here {mine['ensemble'][:12]}...): "
            "give every process the same checkpoint and bases"
        )
    for name, version in mine["versions"].items():
        other = (theirs.get("versions") or {}).get(name)
        if str(other).split(".")[:2] != version.split(".")[:2]:
            return f"it has {name} {other}, this process {version}; install the same"
    return None


def next_frame(channel: Channel, seconds: float) -> Frame:
    """Returns the next frame of a link, waited for; raises `LinkError` where none comes in time."""
    end = time.monotonic() + seconds
    while True:
        for frame in channel.frames():
            return frame
        left = end - time.monotonic()
        if left <= 0 or not readable(channel, left):
            raise NotYet(f"{channel.name!r} did not answer within {seconds:g} s")
