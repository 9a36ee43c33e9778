"""Bridges that are solved for and not trained: the anchor says what a specialist knows, and is itself everywhere else.

One bridge a specialist, behind the last blocks. Its map carries over what the specialist's output layer would say: the
identity between models of one output layer, else `set_vocabulary_start`. Its gate is a logistic regression on the
frozen states (`start_gates`). A few minutes for small models, most of which is running each model once over the
examples; docs/training.md says which examples, docs/log.md what came of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rc_agents.config import BridgeConfig
from rc_agents.errors import TrainingError
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import ANCHOR, Edge
from rc_agents.training import data
from rc_agents.training.gate_start import GateFit, start_gates
from rc_agents.training.vocabulary_start import last_site, set_vocabulary_start
from rc_agents.training.warm_start import gather

BRIDGE = BridgeConfig(gate="token", gate_init=-2.0, gate_floor=0.05, start="zero")
"""The form of bridge that `solve_bridges` is made for."""
LOUD = {
    "identity": 4.0,
    "vocabulary": 8.0,
}  # size of an open bridge's update, in sizes of the anchor's state
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
    max_length: int = 256,
    progress: bool = True,
) -> Solved:
    """Solves the bridges of some specialists behind the last blocks; bridges elsewhere are left as they are.

    Args:
        model: a unilateral ensemble of linear bridges with token gates, such as `BRIDGE`, whose last site is the
            anchor's last block.
        knows: by specialist, some hundred prompts and answers that it knows, in a dozen phrasings, as
            `rc_agents.training.data.read` takes them.
        silent: where no specialist should speak: general text, and pairs of the anchor's own questions and answers
            (`own_answers`).
        states: folder in which the models' states are kept.
        penalty, quiet: of the gates, as in `start_gates`: more of either for fewer answers and more silence.
        max_length: tokens of the longest pair.
        progress: show bars.

    Raises:
        TrainingError: an unknown specialist, another topology or form of bridge, or examples of one kind only.
    """
    begun = time.perf_counter()
    pairs = {name: _pairs(name, found) for name, found in knows.items()}
    quiet_records = data.read(silent)
    texts = [one.text for one in quiet_records if isinstance(one, data.Document)]
    unknown = sorted(set(pairs) - set(model.specialists))
    if unknown or not pairs:
        raise TrainingError(
            f"solve_bridges got examples for {', '.join(unknown) or 'nobody'}; the specialists are "
            f"{', '.join(model.specialists) or 'none'}"
        )
    if not texts:
        raise TrainingError("solve_bridges got no general text in silent; pass some documents")
    edges = {name: Edge(name, ANCHOR) for name in pairs}
    if missing := [name for name, edge in edges.items() if edge not in model.edges]:
        raise TrainingError(f"no bridge leads from {', '.join(missing)} into the anchor")
    carriers = {name: "identity" if _same_output(model, name) else "vocabulary" for name in pairs}
    fits = None
    for name, carrier in carriers.items():
        site = last_site(model, edges[name])
        if carrier == "identity":
            with torch.no_grad():
                weight: Any = model.bridge(edges[name], site).map.weight
                weight.copy_(LOUD[carrier] * torch.eye(len(weight)))
            continue
        fits = fits or gather(model, texts[:SIZED], progress=False)
        set_vocabulary_start(
            model,
            fits,
            edges=[edges[name]],
            answers=[pair.completion for pair in pairs[name]],
            scale=LOUD[carrier],
        )
    gates = start_gates(
        model,
        pairs,
        quiet_records,
        states,
        penalty=penalty,
        quiet=quiet,
        max_length=max_length,
        progress=progress,
    )
    return Solved(carriers, gates, time.perf_counter() - begun)


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
    found = []
    for start in tqdm(range(0, len(prompts), batch_size), "own answers", disable=not progress):
        asked = list(prompts[start : start + batch_size])
        rows = [tokenizer(prompt).input_ids for prompt in asked]
        width, pad = max(map(len, rows)), tokenizer.pad_token_id or 0
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
        answers = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        found += [
            data.Pair(prompt, answer, "own")
            for prompt, answer in zip(asked, answers, strict=True)
            if answer.strip()
        ]
    return found


def _pairs(name: str, source: Any) -> list[data.Pair]:
    records = data.read(source)
    pairs = [one for one in records if isinstance(one, data.Pair)]
    if not pairs or len(pairs) < len(records):
        raise TrainingError(
            f"what {name!r} knows is given as prompts and answers; {len(records) - len(pairs)} of "
            f"{len(records)} examples are texts"
        )
    return pairs


def _same_output(model: CoupledForCausalLM, name: str) -> bool:
    """Whether a specialist's output layer is the anchor's, as that of an adapter over the same base is."""
    own, other = (
        model.models[one].get_output_embeddings().weight.detach().cpu() for one in (ANCHOR, name)
    )
    return own.shape == other.shape and torch.equal(own, other)
