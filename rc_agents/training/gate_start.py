"""Token gates by logistic regression on the frozen models' states: open where a specialist should speak, else shut.

A gate sigmoid(g + v . n(h_source) + u . n(h_target)) is a logistic regression by itself. Tokens of answers that a
specialist knows are its positive examples, tokens on which the ensemble shall stay the anchor its negative ones:

    min  mean over positives of log(1 + e^-z)  +  balance * mean over negatives of log(1 + e^z)  +  penalty * |v, u|^2

The problem is convex and takes seconds, where training a gate through the output layer takes minutes and ends where its
learning rate says. A gate with a floor is then moved and made steeper: a chosen share of the negative examples lies
below the floor, and nearly all of the positive ones where the gate is as good as 1, as half a bridge says nothing.
Shapes: N tokens, D width.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rc_agents.bridges import TokenGate
from rc_agents.errors import TrainingError
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import ANCHOR, Edge
from rc_agents.training import data
from rc_agents.training.states import StateStore

ROWS = 64  # examples read at a time
BATCH = 16  # examples run at a time
MOST = 40_000  # tokens of one kind; a random sample beyond
OPEN, SPEAKING = 0.98, 0.95  # the gate's value that this share of the positive examples reaches
SHUT = 1.0  # how far below the floor, in logits, a gate that stays shut lies
STEEPEST = 8.0  # beyond, a gate is a step that training cannot move


@dataclass(frozen=True)
class GateFit:
    """How well a gate tells its examples apart, at its own floor.

    Attributes:
        open: share of the positive tokens at which it speaks.
        shut: share of the negative tokens at which it does not.
        positives, negatives: tokens of each kind.
    """

    open: float
    shut: float
    positives: int
    negatives: int


def start_gates(
    model: CoupledForCausalLM,
    speak: Mapping[str, Any],
    silent: Any,
    states: str | Path,
    *,
    penalty: float = 1e-3,
    balance: float = 1.0,
    quiet: float = 0.9995,
    max_length: int = 256,
    block_length: int = 128,
    whole_prompts: bool = False,
    only: str | None = None,
    progress: bool = True,
) -> dict[str, GateFit]:
    """Sets the token gates of a unilateral ensemble.

    Each is shut where the others' answers begin and go on, and on every token of `silent`.

    Args:
        model: the ensemble; only gates of the named specialists change.
        speak: by specialist, prompts and answers that it knows, as `rc_agents.training.data.read` takes them; of a
            text, every token but the first one's.
        silent: texts in which no specialist should speak, and pairs about whose answers none should.
        states: folder in which states are kept; training with `states=` finds them there.
        penalty: on the squared weights of the gate.
        balance: factor on the negative examples' mean.
        quiet: share of the negative tokens at which a gate with a floor must be shut.
        max_length, block_length: tokens of the longest pair, and of a block of text.
        whole_prompts: open for the prompt's tokens too, from where the prompts of a group begin to differ, as its
            phrasing alone says nothing; for sites at which the anchor has blocks left to read them.
        only: the one specialist whose gates are set, such as one added later; the others' bits stay.
        progress: show a bar while states are computed.

    Returns:
        `source__target.site` -> how well the gate does on its own examples.

    Raises:
        TrainingError: gates of another kind, an unknown specialist, another topology, or no examples.
    """
    _check(model, speak)
    if only is not None and only not in speak:
        raise TrainingError(f"start_gates got no pairs for only={only!r}")
    tokenizer = model.tokenizer
    sizes = {"max_length": max_length, "block_length": block_length}
    known = {
        name: data.encode(tokenizer, data.read(found), **sizes) for name, found in speak.items()
    }
    quiet_text = data.encode(tokenizer, data.read(silent), **sizes)
    store = StateStore(model, Path(states), progress)
    store.complete([*(one for found in known.values() for one in found), *quiet_text])
    begins = _beginnings([one for found in known.values() for one in found])

    def differing(one: data.Encoded) -> int:
        return begins[one.group] if whole_prompts else max(1, one.answer_start - 1)

    fits = {}
    for edge in model.edges:
        if edge.source not in speak or only not in (None, edge.source):
            continue
        others = [one for name, found in known.items() if name != edge.source for one in found]
        for site in range(len(model.sites)):
            positive = _states(store, edge, site, known[edge.source], differing)
            negative = _states(store, edge, site, quiet_text, lambda one: 1)
            if others:
                theirs = _states(store, edge, site, others, differing)
                negative = {
                    end: torch.cat([states, theirs[end]]) for end, states in negative.items()
                }
            gate: Any = model.bridge(edge, site).gate
            fits[f"{edge.key}.{site}"] = fit_gate(gate, positive, negative, penalty, balance, quiet)
    return fits


Part = Literal["answer", "first", "rest", "prompt", "all"]
"""Tokens of an example by what they predict: the answer, its first token, the others; the prompt; anything."""


@torch.no_grad()
def read_bridge(
    model: CoupledForCausalLM,
    edge: Edge | tuple[str, str],
    site: int,
    examples: Sequence[data.Encoded],
    *parts: Part,
) -> list[dict[str, Tensor]]:
    """Returns what one bridge reads when the ensemble runs as it is: examples for `fit_gate`, in any topology.

    Where bridges lead to bridges, solve for the gate of the one that speaks first, then read the next one.

    Args:
        model: the ensemble.
        edge: of the bridge; its target reads the anchor's tokens.
        site: index into `model.sites`.
        examples: encoded by the anchor's tokenizer.
        parts: which of their tokens; never the first one, whose state is unlike all others.

    Returns:
        For each part the states (N, D) of the `source` and the `target` end, in float32 on the CPU.

    Raises:
        TrainingError: no token is of this part, the bridge does not run, or the target has tokens of its own.
    """
    edge = Edge(*edge)
    if edge.target in model.config.span_names:
        raise TrainingError(f"read_bridge: {edge.target!r} reads the text in tokens of its own")
    bridge = model.bridge(edge, site)
    kept: list[tuple[Tensor, Tensor]] = []
    handle = bridge.register_forward_pre_hook(lambda module, args: kept.append(args[:2]))
    ends = ("source", "target")
    found: list[dict[str, list[Tensor]]] = [{end: [] for end in ends} for _ in parts]
    ordered = sorted(examples, key=lambda one: len(one.ids))
    try:
        for begin in range(0, len(ordered), BATCH):
            chosen = ordered[begin : begin + BATCH]
            batch = data.pad(chosen)
            ids = batch["input_ids"].to(model.device)
            mask = batch.get("attention_mask", torch.ones_like(ids)).to(model.device)
            model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
            if not kept:
                raise TrainingError(
                    f"read_bridge: the bridge {edge.source}->{edge.target} does not run; enable its models"
                )
            states = kept.pop()
            for row, one in enumerate(chosen):
                for part, into in zip(parts, found, strict=True):
                    first, last = _span(one, part)
                    for end, value in zip(ends, states, strict=True):
                        into[end].append(value[row, first:last].float().cpu())
    finally:
        handle.remove()
    for part, states_of in zip(parts, found, strict=True):
        if not sum(map(len, states_of["source"])):
            raise TrainingError(f"read_bridge: the examples have no token that predicts: {part}")
    return [{end: torch.cat(value) for end, value in each.items()} for each in found]


def _span(one: data.Encoded, part: Part) -> tuple[int, int]:
    """Returns the tokens [first, last) of an example that predict this part of it."""
    answer, end = max(1, one.answer_start - 1), len(one.ids) - 1
    spans = {
        "answer": (answer, end),
        "first": (answer, answer + 1),
        "rest": (answer + 1, end),
        "prompt": (1, answer),
        "all": (1, end),
    }
    return spans[part]


def fit_gate(
    gate: TokenGate,
    positive: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    penalty: float = 1e-3,
    balance: float = 1.0,
    quiet: float = 0.9995,
) -> GateFit:
    """Sets one gate.

    Args:
        gate: whose `reads` say which ends it looks at.
        positive, negative: states (N, D) of the `source` and the `target` end.
        penalty, balance, quiet: as in `start_gates`.
    """
    ends = list(gate.reads)
    x_ND = [torch.cat([_normal(part[end]) for end in ends], dim=1) for part in (positive, negative)]
    weight = torch.zeros(x_ND[0].shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        speaks, keeps = (x @ weight + bias for x in x_ND)
        value = (
            nn.functional.softplus(-speaks).mean() + balance * nn.functional.softplus(keeps).mean()
        )
        value = value + penalty * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        speaks, keeps = (x @ weight + bias for x in x_ND)
        steep, shift = _to_floor(speaks, keeps, gate.floor, quiet) if gate.floor else (1.0, 0.0)
        gate.value.copy_(steep * bias[0] + shift)
        start = 0
        for end in ends:
            width = len(gate.reads[end])
            gate.reads[end].copy_(steep * weight[start : start + width])
            start += width
        limit = _logit(gate.floor or 0.5)
        return GateFit(
            open=float((steep * speaks + shift >= limit).float().mean()),
            shut=float((steep * keeps + shift < limit).float().mean()),
            positives=len(speaks),
            negatives=len(keeps),
        )


def _to_floor(speaks: Tensor, keeps: Tensor, floor: float, quiet: float) -> tuple[float, float]:
    """Returns (a, b) so that a z + b lies below the floor for the quiet share, and opens for what speaks.

    Never less steep than the regression, whose own threshold stays where the negatives leave it room.
    """
    limit = _logit(floor)
    threshold = max(float(keeps.quantile(quiet)), limit)
    room = float(speaks.quantile(1 - SPEAKING)) - threshold
    wanted = (_logit(OPEN) - limit) / room if room > 0 else STEEPEST
    steep = min(max(1.0, wanted), STEEPEST)
    return steep, limit - steep * threshold


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _normal(h_ND: Tensor) -> Tensor:
    return nn.functional.rms_norm(h_ND.float(), (h_ND.shape[-1],), eps=1e-6)


def _states(
    store: StateStore,
    edge: Edge,
    site: int,
    examples: Sequence[data.Encoded],
    first_of: Callable[[data.Encoded], int],
) -> dict[str, Tensor]:
    """Returns both ends' states (N, D) at the tokens of each example from its first one on, but for its last."""
    names = {"source": f"{edge.source}.{site}", "target": f"{ANCHOR}.{site}" if site else ANCHOR}
    parts: dict[str, list[Tensor]] = {end: [] for end in names}
    for begin in range(0, len(examples), ROWS):
        chosen = examples[begin : begin + ROWS]
        found = store.rows(chosen)
        for row, one in enumerate(chosen):
            first = first_of(one)
            for end, name in names.items():
                parts[end].append(found[name][row, first : len(one.ids) - 1])
    return thinned({end: torch.cat(found) for end, found in parts.items()})


def thinned(ends: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the states (N, D) of both ends at no more than MOST tokens, a random sample of them."""
    count = len(ends["source"])
    if count <= MOST:
        return dict(ends)
    picked = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MOST]
    return {end: states[picked] for end, states in ends.items()}


def _beginnings(examples: Sequence[data.Encoded]) -> dict[str, int]:
    """Returns for each group how many tokens its prompts begin with alike; at least 1, which is never read."""
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for one in examples:
        groups[one.group].append(one.ids[: one.answer_start])
    found = {}
    for name, rows in groups.items():
        alike = (a == b for a, b in zip(min(rows), max(rows), strict=False))
        found[name] = max(1, sum(itertools.takewhile(bool, alike))) if len(rows) > 1 else 1
    return found


def _check(model: CoupledForCausalLM, speak: Mapping[str, Any]) -> None:
    if not speak:
        raise TrainingError("start_gates needs pairs for at least one specialist")
    for name in speak:
        if Edge(name, ANCHOR) not in model.edges:
            raise TrainingError(
                f"start_gates: no bridge leads from {name!r} into the anchor; the specialists are "
                f"{', '.join(model.specialists)}"
            )
        if not isinstance(model.bridge((name, ANCHOR), 0).gate, TokenGate):
            raise TrainingError(
                "start_gates sets token gates; couple with BridgeConfig(gate='token')"
            )
