"""What becomes of an answer when a specialist's process dies, hangs or is cut off.

`python -m rc_agents.benchmarks.faults`. Every trial generates greedily over an ensemble of processes on loopback, each
specialist behind a relay of ours, and strikes at a random block of a random pass of the anchor: in the prompt's pass or
in a decoding one. The answer must have all its tokens, and be the one that a single process gives when that specialist
is disabled from the same token on. Then the specialist comes back, and the next answer must be the whole ensemble's.

Faults: kill (SIGKILL), stop (SIGSTOP), cut (its link swallows every byte), reset (its link is closed), and stall (its
link holds bytes back for less than the deadline, as a network that loses packets does: nobody may be lost).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import select
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import rc_agents
from rc_agents.nodes import Node, NodeSettings, connect
from rc_agents.provenance import provenance

KINDS = ("kill", "stop", "cut", "reset", "stall")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rc_agents.nodes", "transformers.models.auto.modeling_auto"])


class Relay:
    """Forwards the connections to one address, until it is told to do worse.

    Args:
        target: host and port that it forwards to.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.swallows = False
        self.held_until = 0.0
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Where to connect."""
        host, port = self.server.getsockname()[:2]
        return host, port

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self.target, timeout=5.0)
            except OSError:
                near.close()
                continue
            pair = (near, far)
            for sock in pair:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.pairs.append(pair)
            for source, sink in (pair, pair[::-1]):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while select.select([source], [], [])[0]:
                data = source.recv(1 << 18)
                if not data:
                    break
                if self.swallows:
                    continue
                time.sleep(max(0.0, self.held_until - time.monotonic()))
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def reset(self) -> None:
        """Closes every connection."""
        pairs, self.pairs = self.pairs, []
        for sock in [sock for pair in pairs for sock in pair]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stops."""
        self.reset()
        self.server.close()


def serve(folder: str, name: str, anchor: tuple[str, int], settings: NodeSettings) -> None:
    """The body of a specialist's process."""
    torch.set_num_threads(1)
    with contextlib.suppress(rc_agents.RCError):
        Node(folder, name, settings=settings).serve(anchor, patience=20.0)


@dataclass
class Specialist:
    """One specialist's process, and the relay between it and the anchor's."""

    name: str
    process: Any
    relay: Relay


class Cluster:
    """An ensemble in processes on loopback, each behind a relay, and the same ensemble in this process.

    Args:
        folder: its checkpoint.
        settings: of its processes.
    """

    def __init__(self, folder: str, settings: NodeSettings) -> None:
        self.folder, self.settings = folder, settings
        self.single = rc_agents.CoupledForCausalLM.from_pretrained(folder)
        self.model = connect(folder, settings=settings, wait=None)
        self.hub: Any = self.model.elsewhere
        self.specialists = {name: self._start(name) for name in self.model.specialists}
        self.hub.wait_for(self.specialists, 60.0)

    def _start(self, name: str, relay: Relay | None = None) -> Specialist:
        relay = relay or Relay(self.hub.door.address)
        arguments = (self.folder, name, relay.address, self.settings)
        process = PROCESSES.Process(target=serve, args=arguments, daemon=True)
        process.start()
        return Specialist(name, process, relay)

    def strike(self, name: str, kind: str, seconds: float) -> None:
        """Does it."""
        one = self.specialists[name]
        if kind == "kill":
            os.kill(one.process.pid, signal.SIGKILL)
        elif kind == "stop":
            os.kill(one.process.pid, signal.SIGSTOP)
        elif kind == "cut":
            one.relay.swallows = True
        elif kind == "reset":
            one.relay.reset()
        elif kind == "stall":
            one.relay.held_until = time.monotonic() + seconds

    def mend(self, name: str, kind: str) -> None:
        """Takes the fault away and waits until the specialist is back."""
        one = self.specialists[name]
        if kind == "kill":
            one.process.join(10.0)
            self.specialists[name] = self._start(name, one.relay)
        elif kind == "stop":
            os.kill(one.process.pid, signal.SIGCONT)
        elif kind == "cut":
            one.relay.reset()
            one.relay.swallows = False
        self.hub.wait_for([name], 60.0)

    def close(self) -> None:
        """Ends all processes that it started."""
        self.hub.close()
        for one in self.specialists.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.process.pid, signal.SIGKILL)
            one.process.join(10.0)
            one.relay.close()


@dataclass
class Trial:
    """One fault and what became of the answer.

    Attributes:
        kind, phase, specialist: the fault; phase is prefill or decode.
        struck: pass and block (both from 0) of the anchor at which it struck.
        noticed: position in the text from which the specialist was left out; None where it was not lost.
        waited_s: how long the anchor had waited when it noticed.
        stall_s: the longest time between two tokens.
        seconds: of the whole answer.
        equal: whether the answer is the one that a single process gives.
        missing: tokens that the answer lacks.
        back: whether the next answer is the whole ensemble's again.
    """

    kind: str
    phase: str
    specialist: str
    struck: tuple[int, int]
    noticed: int | None
    waited_s: float
    stall_s: float
    seconds: float
    equal: bool
    missing: int
    back: bool

    @property
    def survived(self) -> bool:
        """Whether nothing was lost but the specialist, and it came back."""
        return self.equal and self.back and not self.missing


def trial(
    cluster: Cluster, ids: torch.Tensor, tokens: int, kind: str, phase: str, rng: random.Random
) -> Trial:
    """Strikes once while `tokens` tokens are generated behind `ids`, (1, T)."""
    name = rng.choice(list(cluster.specialists))
    blocks = cluster.model.config.num_hidden_layers
    when = 0 if phase == "prefill" else rng.randrange(1, tokens)
    struck = (when, rng.randrange(blocks))
    begun = len(cluster.hub.events)
    stamps: list[float] = []
    with striking(
        cluster, struck, lambda: cluster.strike(name, kind, 0.4 * cluster.settings.deadline)
    ):
        start = time.monotonic()
        answer = generate(cluster.model, ids, tokens, stamps)
        seconds = time.monotonic() - start
    lost = {event.name: event for event in cluster.hub.events[begun:] if event.what == "lost"}
    expected = reference(cluster.single, ids, tokens, {one: e.position for one, e in lost.items()})
    if kind != "stall":
        if name not in lost:  # the answer was done before anybody needed it again
            generate(cluster.model, ids, 2, [])
        cluster.mend(name, kind)
    for other in lost:
        cluster.hub.wait_for([other], 60.0)
    again = generate(cluster.model, ids, 4, [])
    gaps = [b - a for a, b in zip([start, *stamps], stamps, strict=False)]
    return Trial(
        kind=kind,
        phase=phase,
        specialist=name,
        struck=struck,
        noticed=lost[name].position if name in lost else None,
        waited_s=max((event.seconds for event in lost.values()), default=0.0),
        stall_s=max(gaps),
        seconds=seconds,
        equal=bool(answer == expected) and not (kind == "stall" and lost),
        missing=tokens - len(answer),
        back=again == reference(cluster.single, ids, 4, {}),
    )


@contextlib.contextmanager
def striking(cluster: Cluster, at: tuple[int, int], strike: Any) -> Iterator[None]:
    """Calls `strike` when the anchor's pass `at[0]` has run its block `at[1]`, once."""
    passes = 0
    done = threading.Event()

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal passes
        passes += 1

    def after(module: Any, args: Any, output: Any) -> None:
        if passes == at[0] and not done.is_set():
            done.set()
            strike()

    anchor = cluster.model.models["anchor"]
    layers = next(
        one
        for one in anchor.modules()
        if isinstance(one, torch.nn.ModuleList)
        and len(one) == cluster.model.config.num_hidden_layers
    )
    handles = [layers[at[1]].register_forward_hook(after), anchor.register_forward_hook(count)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def generate(model: Any, ids: torch.Tensor, tokens: int, stamps: list[float]) -> list[int]:
    """Greedy tokens behind `ids`, by `generate()`; appends the time of each."""

    class Stamps:
        def put(self, value: torch.Tensor) -> None:
            stamps.append(time.monotonic())

        def end(self) -> None:
            pass

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="specialist .* is lost")
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=Stamps(),
        )
    stamps[:] = stamps[1:]  # the first is the prompt
    return list(output[0, ids.shape[1] :].tolist())


@torch.inference_mode()
def reference(model: Any, ids: torch.Tensor, tokens: int, lost: dict[str, int | None]) -> list[int]:
    """What one process gives, each specialist disabled from a position of the text on."""
    eos = model.generation_config.eos_token_id
    never = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    cache, step, answer = None, ids, []
    for _ in range(tokens):
        past = 0 if cache is None else cache.get_seq_length()
        cut = [name for name, position in lost.items() if position is not None and past >= position]
        with model.disabled(*cut) if cut else contextlib.nullcontext():
            output = model(step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].clone()
        logits[:, never] = -torch.inf
        step = logits.argmax(-1, keepdim=True)
        answer.append(int(step))
    return answer


def run(
    cluster: Cluster,
    trials: int,
    tokens: int,
    prompt: tuple[int, int],
    seed: int,
    kinds: Sequence[str] = KINDS,
) -> list[Trial]:
    """Runs so many trials, the kinds in turn, prefill every other time.

    Args:
        cluster: what is struck.
        trials: how many.
        tokens: of each answer.
        prompt: shortest and longest prompt, in tokens.
        seed: of prompts, places and victims.
        kinds: of faults.
    """
    rng, made = random.Random(seed), []
    generator = torch.Generator().manual_seed(seed)
    for number in range(trials):
        length = rng.randint(*prompt)
        high = cluster.model.config.vocab_size
        ids = torch.randint(5, high, (1, length), generator=generator)
        phase = "decode" if number // len(kinds) % 2 else "prefill"
        made.append(trial(cluster, ids, tokens, kinds[number % len(kinds)], phase, rng))
    return made


def summary(trials: Sequence[Trial], deadline: float) -> dict[str, Any]:
    """The figures of record."""
    return {
        "faults_injected": len(trials),
        "faults_survived": sum(one.survived for one in trials),
        "specialists_lost": sum(one.noticed is not None for one in trials),
        "tokens_lost": sum(one.missing for one in trials),
        "answers_unequal": sum(not one.equal for one in trials),
        "longest_stall_s": round(max(one.stall_s for one in trials), 3),
        "longest_wait_s": round(max(one.waited_s for one in trials), 3),
        "deadline_s": deadline,
        "by_kind": {
            kind: {
                phase: [
                    sum(one.survived for one in trials if (one.kind, one.phase) == (kind, phase)),
                    sum((one.kind, one.phase) == (kind, phase) for one in trials),
                ]
                for phase in ("prefill", "decode")
            }
            for kind in KINDS
        },
    }


def tiny_ensemble(folder: str, seed: int = 0) -> None:
    """Saves three random tiny models, coupled all ways, with bridges that are heard."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(seed)
    models = [
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        for kind in ("llama", "qwen2", "mistral")
    ]
    model = rc_agents.couple(
        models[0], {"medical": models[1], "law": models[2]}, alignment="shared", sites=2
    )
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder, include_bases=True)


def real_ensemble(folder: str, seed: int = 0) -> None:
    """Saves SmolLM2-135M with a twin of its own, coupled both ways, with bridges that are heard."""
    place = "package:smollm2-135m"
    model = rc_agents.couple(place, {"twin": place}, topology="star_bilateral", dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            scale = 0.02 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)


def main() -> None:
    """Strikes, prints a table, writes a record, and prints it as a JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=200, help="on tiny models")
    parser.add_argument("--real", type=int, default=20, help="on two SmolLM2-135M besides")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds, for tiny models")
    parser.add_argument("--real-deadline", type=float, default=10.0, help="seconds, for SmolLM2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/faults"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {}
    for which, make, count, deadline, tokens, prompt in (
        ("tiny", tiny_ensemble, arguments.faults, arguments.deadline, 12, (4, 64)),
        ("smollm2-135m", real_ensemble, arguments.real, arguments.real_deadline, 8, (32, 128)),
    ):
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            make(folder)
            cluster = Cluster(folder, NodeSettings(deadline=deadline))
            try:
                trials = run(cluster, count, tokens, prompt, arguments.seed)
            finally:
                cluster.close()
        record = {
            "benchmark": "faults",
            "ensemble": which,
            **summary(trials, deadline),
            "settings": {"tokens": tokens, "prompt": list(prompt), "seed": arguments.seed},
            "trials": [asdict(one) for one in trials],
            **provenance(arguments.seed),
        }
        file = arguments.output / f"{which}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{which}: {record['faults_survived']} of {count} survived", record["by_kind"])
        print(json.dumps({key: value for key, value in record.items() if key != "trials"}))


if __name__ == "__main__":
    main()
