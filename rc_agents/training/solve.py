"""Bridges that are solved for and not trained: the anchor says what a specialist knows, and is itself everywhere else.

One bridge a specialist, behind the last blocks. Its map carries over what the specialist's output layer would say: the
identity between models of one output layer, else `set_vocabulary_start`. Its gate is a logistic regression on the
frozen states (`start_gates`). A few minutes for small models, most of which is running each model once over the
examples; docs/training.md says which examples, docs/log.md what came of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rc_agents.bridges import TokenGate
from rc_agents.config import BridgeConfig
from rc_agents.errors import TrainingError
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import ANCHOR, Edge
from rc_agents.training import data
from rc_agents.training.gate_start import GateFit, start_gates
from rc_agents.training.vocabulary_start import last_site, norm_weights, vocabulary_map
from rc_agents.training.warm_start import gather

BRIDGE = BridgeConfig(gate="token", gate_init=-2.0, gate_floor=0.05, start="zero")
"""The form of bridge that `solve_bridges` is made for."""
BLEND = BridgeConfig(
    gate="token",
    gate_init=-4.0,
    gate_floor=0.05,
    start="identity",
    update="blend",
    normalize_source=False,
)
"""The form between models of one base: an open gate goes on as the specialist would, a shut one is the anchor."""
LOUD = {
    "identity": 4.0,
    "vocabulary": 8.0,
}  # size of an open bridge's update, in sizes of the anchor's state; a blend need not outshout it
BLOCK = 128  # tokens of a block of text
SIZED = 8  # texts that say how large a specialist's states are


@dataclass(frozen=True)
class Solved:
    """What `solve_bridges` did.

    Attributes:
        carriers: specialist -> `identity` or `vocabulary`.
        gates: `source__target.site` -> how well its gate does on its own examples.
        seconds: wall time.
    """

    carriers: Mapping[str, str]
    gates: Mapping[str, GateFit]
    seconds: float


def solve_bridges(
    model: CoupledForCausalLM,
    knows: Mapping[str, Any],
    silent: Any,
    states: str | Path,
    *,
    penalty: float = 1e-3,
    quiet: float = 0.9995,
    progress: bool = True,
) -> Solved:
    """Solves the bridges of some specialists; those of the others keep every bit.

    Args:
        model: a unilateral ensemble of linear bridges with token gates, such as `BRIDGE`, that meets once, behind the
            last blocks.
        knows: by specialist, some hundred prompts and answers that it knows, in a dozen phrasings, or texts of a kind
            that it knows better, as `rc_agents.training.data.read` takes them.
        silent: where no specialist should speak: general text, and pairs of the anchor's own questions and answers
            (`own_answers`).
        states: folder in which the models' states are kept.
        penalty, quiet: of the gates, as in `start_gates`: more of either for fewer answers and more silence.
        progress: show bars.

    Raises:
        TrainingError: an unknown specialist, another topology or form of bridge, or examples of one kind only; nothing
            has been changed then.
    """
    begun = time.perf_counter()
    known = {name: data.read(found) for name, found in knows.items()}
    quiet_records = data.read(silent)
    texts = _texts(quiet_records)
    if not texts:
        raise TrainingError("solve_bridges got no general text in silent; pass some documents")
    check_solvable(model, list(known))
    carriers = {name: "identity" if _same_output(model, name) else "vocabulary" for name in known}
    maps = _maps(model, carriers, known, texts)
    for name, found in maps.items():
        weight: Any = model.bridge((name, ANCHOR), 0).map.weight
        weight.data.copy_(found)
    every = [*quiet_records, *(one for found in known.values() for one in found)]
    gates = start_gates(
        model,
        known,
        quiet_records,
        states,
        penalty=penalty,
        quiet=quiet,
        max_length=_longest(model, every),
        block_length=_block(model, [quiet_records, *known.values()]),
        progress=progress,
    )
    return Solved(carriers, gates, time.perf_counter() - begun)


def check_solvable(model: CoupledForCausalLM, names: Sequence[str]) -> None:
    """Raises `TrainingError` unless the bridges of these specialists can be solved for."""
    unknown = sorted(set(names) - set(model.specialists))
    if unknown or not names:
        raise TrainingError(
            f"solve_bridges got examples for {', '.join(unknown) or 'nobody'}; the specialists are "
            f"{', '.join(model.specialists) or 'none'}"
        )
    if any(edge.target != ANCHOR for edge in model.edges) or model.mixer.kind != ANCHOR:
        raise TrainingError(
            "solve_bridges sets bridges into the anchor, which alone answers: couple with topology='unilateral'"
        )
    if len(model.sites) > 1:
        raise TrainingError(
            f"solve_bridges sets one bridge a specialist, and this ensemble meets {len(model.sites)} times: couple "
            "with sites=1"
        )
    if model.tokenizer is None:
        raise TrainingError("solve_bridges reads text and needs the anchor's tokenizer")
    for name in names:
        last_site(model, Edge(name, ANCHOR))
        if not isinstance(model.bridge((name, ANCHOR), 0).gate, TokenGate):
            raise TrainingError(
                "solve_bridges sets token gates: couple with bridge=rc_agents.training.solve.BRIDGE"
            )


def _maps(
    model: CoupledForCausalLM,
    carriers: Mapping[str, str],
    known: Mapping[str, Sequence[data.Record]],
    texts: Sequence[str],
) -> dict[str, Tensor]:
    """Returns each specialist's map; the bridges are left as they are."""
    maps = {}
    fits = (
        gather(model, texts[:SIZED], progress=False) if "vocabulary" in carriers.values() else None
    )
    for name, carrier in carriers.items():
        if fits is None or carrier == "identity":
            bridge: Any = model.bridge((name, ANCHOR), 0)
            loud = 1.0 if bridge.blends else LOUD["identity"]
            maps[name] = loud * torch.eye(len(bridge.map.weight))
        else:
            told = [one.completion for one in known[name] if isinstance(one, data.Pair)]
            maps[name], _ = vocabulary_map(
                model, Edge(name, ANCHOR), fits, answers=told, scale=LOUD["vocabulary"]
            )
    return maps


def _length(model: CoupledForCausalLM, text: str) -> int:
    tokenizer: Any = model.tokenizer
    return len(tokenizer(text).input_ids)


def _longest(model: CoupledForCausalLM, records: Sequence[data.Record]) -> int:
    """Returns how many tokens the longest pair has, its end and a space between its parts included."""
    pairs = [one for one in records if isinstance(one, data.Pair)]
    sizes = (_length(model, one.prompt) + _length(model, one.completion) for one in pairs)
    return max(sizes, default=0) + 2


def _block(model: CoupledForCausalLM, sets: Sequence[Sequence[data.Record]]) -> int:
    """Returns the tokens of a block of text: no more than the shortest set that has texts."""
    sizes = [sum(_length(model, text) + 1 for text in _texts(records)) for records in sets]
    return min([BLOCK, *filter(None, sizes)])


def _texts(records: Sequence[data.Record]) -> list[str]:
    return [one.text for one in records if isinstance(one, data.Document)]


@torch.no_grad()
def own_answers(
    model: CoupledForCausalLM,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: bool = True,
) -> list[data.Pair]:
    """Returns what the frozen anchor answers to prompts, greedily: examples of where specialists shall be silent.

    Prompts that it answers with nothing are left out.

    Raises:
        TrainingError: the ensemble has no tokenizer.
    """
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise TrainingError("own_answers reads text and needs the anchor's tokenizer")
    ends = {*_listed(model.generation_config.eos_token_id), tokenizer.eos_token_id} - {None}
    pad = next(iter(one for one in (tokenizer.pad_token_id, *ends, 0) if one is not None))
    found = []
    for start in tqdm(range(0, len(prompts), batch_size), "own answers", disable=not progress):
        asked = list(prompts[start : start + batch_size])
        rows = [tokenizer(prompt).input_ids for prompt in asked]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        made = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            specialists=[],
        )
        kept = [
            list(itertools.takewhile(lambda token: token not in ends, row))
            for row in made[:, width:].tolist()
        ]
        answers = tokenizer.batch_decode(kept, skip_special_tokens=True)
        found += [
            data.Pair(prompt, answer, "own", ends=len(tokens) < max_new_tokens)
            for prompt, answer, tokens in zip(asked, answers, kept, strict=True)
            if answer.strip()
        ]
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _same_output(model: CoupledForCausalLM, name: str) -> bool:
    """Whether a specialist says of a state what the anchor says, as an adapter on blocks of the same base does."""
    ends = [model.models[one] for one in (ANCHOR, name)]
    heads: list[Any] = [end.get_output_embeddings() for end in ends]
    if any(hasattr(head, "base_layer") for head in heads):
        return False
    own, other = (head.weight.detach().cpu() for head in heads)
    if own.shape != other.shape or not torch.equal(own, other):
        return False
    ours, theirs = (
        norm_weights(end, one)[0] for end, one in zip(ends, (ANCHOR, name), strict=True)
    )
    return torch.allclose(ours, theirs, rtol=1e-3)
