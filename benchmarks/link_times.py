"""How long passes over two links take, and what crosses: both ensembles take turns at the same tokens."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from rc_agents.benchmarks.link_forms import PROFILES, Form, Pair
from rc_agents.benchmarks.link_rows import rows
from rc_agents.benchmarks.shaped import Delay, Namespaces

import rc_agents
from rc_agents.nodes import NodeSettings, connect, read_secret

SETTINGS = NodeSettings(deadline=120.0, join=60.0)


@contextlib.contextmanager
def specialist(
    folder: str, address: tuple[str, int], secret: str, namespace: str | None = None
) -> Iterator[None]:
    """A twin's process, in this namespace or another one."""
    within = [] if namespace is None else ["ip", "netns", "exec", namespace]
    node = [sys.executable, "-m", "rc_agents", "node", folder, "--role", "specialist"]
    options = ["--name", "twin", "--connect", f"{address[0]}:{address[1]}", "--threads", "1"]
    more = ["--secret-file", secret, "--deadline", "120", "--patience", "30"]
    process = subprocess.Popen([*within, *node, *options, *more])
    try:
        yield
    finally:
        process.kill()
        process.wait(10.0)


def seconds_and_bytes(model: Any, call: Any) -> tuple[float, int, int]:
    """Time of a call, and what crossed to the specialist and from it."""
    channel = model.elsewhere.channels["twin"]
    before = channel.sent, channel.received
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    return took, channel.sent - before[0], channel.received - before[1]


class Reader:
    """Reads the same tokens with one ensemble again and again.

    Args:
        model: over links.
        ids: (1, T), the prompt; the first 16 lie in the cache behind which tokens are decoded.
    """

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.renew()

    def renew(self) -> None:
        """Begins a new text, as one does behind a link that was made anew; warms up."""
        self.cache = self.model(self.ids[:, :16], use_cache=True).past_key_values
        self.decode(1)
        self.prefill()

    def prefill(self) -> list[tuple[float, int, int]]:
        """One pass over the prompt, of which the last logits are wanted."""

        def call() -> None:
            self.model(self.ids, use_cache=True, logits_to_keep=1)

        return [seconds_and_bytes(self.model, call)]

    def decode(self, steps: int) -> list[tuple[float, int, int]]:
        """Single tokens behind the cache, taken off again afterwards."""
        found = []
        for k in range(steps):

            def call(k: int = k) -> None:
                step = self.ids[:, 16 + k : 17 + k]
                self.model(step, past_key_values=self.cache, use_cache=True)

            found.append(seconds_and_bytes(self.model, call))
        self.cache.crop(-steps)
        return found


@torch.inference_mode()
def compare(
    pair: Pair, form: Form, relay: Delay, spaces: Namespaces, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields one row a profile, wire format and kind of pass."""
    secret = arguments.inside[2]
    settings = replace(SETTINGS, secret=read_secret(secret))
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(5, 512, (1, arguments.tokens), generator=generator)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        form.save(pair, folder)
        models: dict[str, Any] = {}
        for place in ("loopback", "link"):
            models[place] = connect(folder, settings=settings, wait=None)
            stack.callback(models[place].elsewhere.close)
        doors = {place: model.elsewhere.door.address for place, model in models.items()}
        relay.to(doors["link"][1])
        stack.enter_context(specialist(folder, doors["loopback"], secret))
        stack.enter_context(specialist(folder, relay.address, secret, spaces.specialist))
        models["loopback"].elsewhere.wait_for(["twin"], 120.0)
        for profile in PROFILES:
            hub = models["link"].elsewhere
            hub.wait_for(["twin"], 120.0)
            joined = len(hub.events)
            spaces.shape(profile.up, profile.down)
            relay.set(profile.latency)
            rejoin(hub, joined)
            readers = {place: Reader(model, ids) for place, model in models.items()}
            begun = len(hub.events)
            for wire in form.wires:
                if time.monotonic() > arguments.until:
                    return
                found = measure(readers, wire, pair.repeats, arguments.steps)
                yield from rows(pair, form, profile, wire, found, arguments.tokens)
            if any(event.what == "lost" for event in hub.events[begun:]):
                raise rc_agents.RCError("the measure is void: the twin was lost in it")


def rejoin(hub: Any, joined: int) -> None:
    """Waits until the twin, whose link was closed, has come in again behind the first `joined` events."""
    end = time.monotonic() + 120.0
    while all(event.what != "joined" for event in hub.events[joined:]):
        if time.monotonic() > end:
            raise rc_agents.RCError("the twin did not come back within 120 s behind the new link")
        time.sleep(0.1)


def measure(
    readers: dict[str, Reader], wire: str, repeats: int, steps: int
) -> dict[tuple[str, str], list[list[tuple[float, int, int]]]]:
    """Rounds of seconds and bytes by place and kind of pass; all of them in turn."""
    found: dict[tuple[str, str], list[list[tuple[float, int, int]]]] = {}
    for reader in readers.values():
        hub = reader.model.elsewhere
        hub.settings = replace(hub.settings, wire=wire)
    for _ in range(repeats):
        for kind in ("prefill", "decode"):
            for place, reader in readers.items():
                once = reader.prefill() if kind == "prefill" else reader.decode(steps)
                found.setdefault((place, kind), []).append(once)
    return found
