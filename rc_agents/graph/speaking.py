"""Pairs of prompt and completion as a graph that speaks is trained on them. Shapes: B pairs, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..training.data import Pair
from .model import LatentGraph


def spoken(
    graph: LatentGraph, pairs: Sequence[Pair]
) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Returns what every node reads and the voice's labels.

    Args:
        graph: with a voice.
        pairs: not empty.

    Returns:
        Batches by node: the prompts, and of the voice prompt and completion. Labels (B, T) for the voice, -100 but at
        the completion and its end.
    """
    voice = str(graph.config.voice)
    prompts = [pair.prompt for pair in pairs]
    batches = graph.read_texts(prompts)
    tokenizer: Any = graph.members[voice].tokenizer
    rows, labels = [], []
    for pair in pairs:
        asked = tokenizer(pair.prompt).input_ids
        said = tokenizer(pair.completion, add_special_tokens=False).input_ids
        if pair.ends and tokenizer.eos_token_id is not None:
            said = [*said, tokenizer.eos_token_id]
        rows.append([*asked, *said])
        labels.append([-100] * len(asked) + list(said))
    batches[voice] = {
        "input_ids": _left([torch.tensor(row) for row in rows], 0),
        "attention_mask": _left([torch.ones(len(row), dtype=torch.long) for row in rows], 0),
    }
    return batches, _left([torch.tensor(row) for row in labels], -100)


def _left(rows: Sequence[Tensor], value: int) -> Tensor:
    """Pads rows on the left."""
    width = max(map(len, rows))
    return torch.stack(
        [torch.nn.functional.pad(row, (width - len(row), 0), value=value) for row in rows]
    )
