"""What a link between two processes of an ensemble costs, in seconds and bytes: loopback, LAN, WAN, edge uplink.

`python -m rc_agents.benchmarks.links`, as root on Linux with iproute2. A model and its twin: the anchor's process
in one network namespace, the twin's twice, beside the anchor on loopback and in another namespace behind a shaped link
(`shaped.py`). Both ensembles take turns at the same tokens, so that what else runs on the machine meets both alike.
Every figure is compared with what the cost model predicts from the loopback's (`cost_model.py`).

Two pairs: SmolLM2-135M, and random models of its width that compute next to nothing, so that the link is all there is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks import cost_model
from rc_agents.benchmarks.files import read, write
from rc_agents.benchmarks.shaped import (
    ANCHOR_HOST,
    CannotShape,
    Delay,
    Namespaces,
    namespaces,
)

import rc_agents
from rc_agents.nodes import NodeSettings, connect, read_secret
from rc_agents.provenance import provenance

WIDTH = 576


@dataclass(frozen=True)
class Pair:
    """A model and its twin.

    Attributes:
        name: of the pair.
        blocks: of each.
        head: share of the anchor's time for one token behind its last block, by parameters.
        repeats: rounds of a cell.
    """

    name: str
    blocks: int
    head: float
    repeats: int

    def models(self) -> tuple[Any, Any]:
        """What `couple` takes."""
        if self.name == "smollm2-135m":
            return "package:smollm2-135m", "package:smollm2-135m"
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=512,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=self.blocks,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)


PAIRS = (Pair("tiny", 10, 0.03, 6), Pair("smollm2-135m", 30, 0.21, 4))
SETTINGS = NodeSettings(deadline=120.0, join=60.0)
WIRES = ("exact", "bfloat16", "int8")


@dataclass(frozen=True)
class Profile:
    """A link between anchor and specialist.

    Attributes:
        name: of it.
        latency: seconds one way.
        up: bits a second from the specialist.
        down: bits a second to the specialist.
    """

    name: str
    latency: float
    up: float
    down: float


PROFILES = (
    Profile("lan", 0.0002, 1e9, 1e9),
    Profile("wan", 0.02, 100e6, 100e6),
    Profile("edge", 0.03, 10e6, 50e6),
)


@dataclass(frozen=True)
class Form:
    """How anchor and twin are coupled.

    Attributes:
        name: of it.
        topology: preset.
        sites: of the anchor and of the twin, in tenths of their blocks.
        wires: that are tried.
    """

    name: str
    topology: str
    sites: tuple[tuple[int, int], ...]
    wires: tuple[str, ...] = ("exact",)

    def plan(
        self, pair: Pair, seconds: float, kind: str, tokens: int, wire: str
    ) -> cost_model.Plan:
        """The cost model's plan, both models taking so many seconds by themselves."""
        own, twin = zip(*self.sites, strict=True)
        head = pair.head if kind == "decode" else 0.0  # of a prompt, one token's logits are made
        up, down = ("twin", "anchor"), ("anchor", "twin")
        return cost_model.Plan(
            compute={
                "anchor": cost_model.spread(seconds, [tenth / 10 for tenth in own], head),
                "twin": cost_model.spread(seconds, [tenth / 10 for tenth in twin], head),
            },
            edges=[up] if self.topology == "unilateral" else [up, down],
            widths={"anchor": WIDTH, "twin": WIDTH},
            tokens=tokens,
            wire=wire,
            deaf=twin[-1] == 10,
        )

    def save(self, pair: Pair, folder: str) -> None:
        """Saves the ensemble, with bridges that are heard."""
        each = pair.blocks // 10
        sites = [{"anchor": each * own, "twin": each * twin} for own, twin in self.sites]
        anchor, twin = pair.models()
        settings = {"topology": self.topology, "sites": sites, "dtype": "float32"}
        model = rc_agents.couple(anchor, {"twin": twin}, alignment="shared", **settings)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, parameter in model.trainable_parameters():
                scale = 0.02 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.save_pretrained(folder, include_bases=pair.name == "tiny")


FIVE = tuple((tenth, tenth) for tenth in (2, 4, 6, 8, 10))
FORMS = (
    Form("unilateral 5", "unilateral", FIVE, WIRES),
    Form("star 5", "star_bilateral", FIVE, WIRES),
    Form("unilateral 1", "unilateral", ((10, 10),)),
    Form("star 1", "star_bilateral", ((10, 10),)),
    Form("unilateral 1, twin ahead", "unilateral", ((10, 3),)),
)


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


def rows(
    pair: Pair, form: Form, profile: Profile, wire: str, found: Any, prompt: int
) -> Iterator[dict[str, Any]]:
    """One row each of prefill and decode: measured on loopback and the link, and predicted."""
    for kind in ("prefill", "decode"):
        tokens = prompt if kind == "prefill" else 1
        times = {
            place: [one[0] for once in found[place, kind] for one in once]
            for place in ("loopback", "link")
        }
        middle = {place: statistics.median(values) for place, values in times.items()}
        by_round = [
            statistics.median(one[0] for one in far) - statistics.median(one[0] for one in near)
            for far, near in zip(found["link", kind], found["loopback", kind], strict=True)
        ]
        plan = form.plan(pair, middle["loopback"], kind, tokens, wire)
        port = cost_model.Port(up=profile.up, down=profile.down)
        predicted = cost_model.pass_seconds(plan, {"twin": port}, profile.latency)
        bare = cost_model.pass_seconds(plan)
        crossed = [one[1:] for once in found["link", kind] for one in once]
        traffic = cost_model.traffic(plan)
        yield {
            "pair": pair.name,
            "form": form.name,
            "profile": profile.name,
            "wire": wire,
            "kind": kind,
            "loopback_s": spread(times["loopback"]),
            "link_s": spread(times["link"]),
            "added_s": {**spread(by_round), "predicted": round(predicted - bare, 5)},
            "predicted_s": round(middle["loopback"] + predicted - bare, 5),
            "bytes": {
                "to_specialist": statistics.median(one[0] for one in crossed),
                "from_specialist": statistics.median(one[1] for one in crossed),
                "predicted_to": traffic["anchor", "twin"],
                "predicted_from": traffic["twin", "anchor"],
            },
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and count."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    named = {"median": middle, "low_quartile": low, "high_quartile": high}
    return {**{key: round(value, 5) for key, value in named.items()}, "count": len(values)}


def inside(arguments: argparse.Namespace) -> None:
    """Measures, in the anchor's namespace; writes the record after each form, and prints it as a JSON line last."""
    spaces = Namespaces(*arguments.inside[:2])
    arguments.until = time.monotonic() + 60 * arguments.minutes
    arguments.origin = provenance(arguments.seed)  # of the code that runs
    relay = Delay(ANCHOR_HOST)
    found: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    try:
        for pair in PAIRS:
            for form in FORMS:
                if pair.name in arguments.pairs and time.monotonic() < arguments.until:
                    for row in compare(pair, form, relay, spaces, arguments):
                        found.append(row)
                        print(line(row), flush=True)
                    record = recorded(found, arguments)
                    write(arguments.output, record)
    finally:
        relay.close()
    print(json.dumps(record))


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['pair']:12} {row['form']:24} {row['profile']:4} {row['wire']:8} {row['kind']:7}"
        f" loopback {1e3 * row['loopback_s']['median']:7.1f} ms"
        f"  added {1e3 * row['added_s']['median']:7.1f} predicted {1e3 * row['added_s']['predicted']:7.1f}"
        f"  bytes to {row['bytes']['to_specialist']:.0f} from {row['bytes']['from_specialist']:.0f}"
    )


def table(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """A record's rows of one kind of pass as a Markdown table, in milliseconds."""
    lines = [
        "| pair | form | link | wire | loopback (quartiles) | link (quartiles) | predicted | measured / predicted "
        "| bytes to / from specialist, counted | by the model |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["kind"] != kind:
            continue
        times = [
            "{:.0f} ({:.0f} to {:.0f})".format(
                *(1e3 * row[place][key] for key in ("median", "low_quartile", "high_quartile"))
            )
            for place in ("loopback_s", "link_s")
        ]
        size = row["bytes"]
        lines.append(
            f"| {row['pair']} | {row['form']} | {row['profile']} | {row['wire']} | {' | '.join(times)}"
            f" | {1e3 * row['predicted_s']:.0f} | {row['link_s']['median'] / row['predicted_s']:.2f}"
            f" | {size['to_specialist']:,.0f} / {size['from_specialist']:,.0f}"
            f" | {size['predicted_to']:,} / {size['predicted_from']:,} |"
        )
    return "\n".join(lines)


def recorded(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """The record."""
    settings = {key: getattr(arguments, key) for key in ("steps", "tokens", "seed")}
    return {
        "benchmark": "links",
        "profiles": [asdict(profile) for profile in PROFILES],
        "pairs": [asdict(pair) for pair in PAIRS],
        "forms": [asdict(form) for form in FORMS],
        "rows": rows,
        "settings": settings,
        "load_average": os.getloadavg(),
        **arguments.origin,
    }


def main() -> None:
    """Makes the namespaces, measures in them, and removes them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="decoded tokens of a round")
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="begins no cell after that")
    parser.add_argument("--pairs", nargs="+", default=[pair.name for pair in PAIRS])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/links/links.json"))
    parser.add_argument("--show", type=Path, help="print this record's tables, measure nothing")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.show:
        for kind in ("decode", "prefill"):
            print(table(read(arguments.show)["rows"], kind), end="\n\n")
        return
    if arguments.inside:
        inside(arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go
    try:
        with namespaces() as spaces, tempfile.NamedTemporaryFile() as secret_file:
            secret_file.write(os.urandom(32).hex().encode())
            secret_file.flush()
            spaces.shape(PROFILES[0].up, PROFILES[0].down)
            told = ["--inside", spaces.anchor, spaces.specialist, secret_file.name]
            again = [sys.executable, "-m", "rc_agents.benchmarks.links", *sys.argv[1:], *told]
            subprocess.run(["ip", "netns", "exec", spaces.anchor, *again], check=True)
    except CannotShape as why:
        print(f"skipped: this needs root, network namespaces and tbf on Linux; {why}")


if __name__ == "__main__":
    main()
