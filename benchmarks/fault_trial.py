"""One fault in the middle of an answer, and what became of the answer."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rc_agents.benchmarks.fault_cluster import Cluster


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
    kinds: Sequence[str] | None = None,
) -> list[Trial]:
    """Runs so many trials, the kinds in turn, prefill every other time.

    Args:
        cluster: what is struck.
        trials: how many.
        tokens: of each answer.
        prompt: shortest and longest prompt, in tokens.
        seed: of prompts, places and victims.
        kinds: of faults; all that the cluster's network can do by default.
    """
    rng, made = random.Random(seed), []
    kinds = kinds or cluster.kinds
    generator = torch.Generator().manual_seed(seed)
    for number in range(trials):
        length = rng.randint(*prompt)
        high = cluster.model.config.vocab_size
        ids = torch.randint(5, high, (1, length), generator=generator)
        phase = "decode" if number // len(kinds) % 2 else "prefill"
        made.append(trial(cluster, ids, tokens, kinds[number % len(kinds)], phase, rng))
    return made
