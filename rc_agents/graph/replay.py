"""A training pass on kept states: level one is read from disk, a node that hears runs from the block where it does.

Shapes: B texts, T tokens, D width, H heads of keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..backbone import (
    StandIn,
    accepted_arguments,
    cache_argument,
    find_blocks,
    returns_tuple,
    share_weights,
)
from ..errors import TrainingError
from ..execution.protocol import NO_LOGITS, Call
from .frozen import FrozenNode, Hear
from .kept import Kept
from .model import LatentGraph
from .parts import BEFORE, ENTERING, STATES
from .reading import Read, Texts, tokenize

TOLERANCE = 1e-3  # of the largest score, in float32
COARSE = 5e-2  # in half precision


class _Read(Exception):
    """The states were read; what lies above them is not needed."""


class UpperBlocks:
    """A node's model from the block where it hears to the one where it is read; its weights are the model's own."""

    def __init__(self, node: FrozenNode) -> None:
        self.node = node
        self.model = share_weights(node.model).eval()
        self.entering = torch.empty(0)
        self.read = torch.empty(0)
        blocks, tuples = find_blocks(self.model), returns_tuple(node.model, node.at)
        for index in range(node.at):
            gives = self._enter if index == node.at - 1 else None
            blocks[index] = StandIn(blocks[index], gives, tuples)
        blocks[node.layer - 1].register_forward_hook(self._leave)

    def _enter(self) -> Tensor:
        return self.entering

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.read = output[0] if isinstance(output, tuple) else output
        raise _Read

    def run(self, entering_BTD: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Returns the states behind the block that is read, (B, T, D)."""
        self.entering = entering_BTD
        try:
            Call(arguments, NO_LOGITS).of(self.model)
        except _Read:
            return self.read
        finally:
            self.entering = self.read = torch.empty(0)
        raise AssertionError("the block that is read did not run")


@dataclass
class Replay:
    """Runs a graph on kept states.

    Args:
        graph: whose choices are asked for.
        kept: the states.
    """

    graph: LatentGraph
    kept: Kept

    def __post_init__(self) -> None:
        self.upper = {
            name: UpperBlocks(node)
            for name in self.graph.config.hearing
            if isinstance(node := self.graph.nodes[name], FrozenNode)
        }

    def of(self, texts: Texts) -> ReplayRun:
        """Returns a run over texts whose states are kept."""
        return ReplayRun(self, self.graph.texts_of(texts))

    @torch.no_grad()
    def check(self, texts: Texts) -> None:
        """Raises `TrainingError` unless a replay scores some texts as the whole graph does."""
        found, run = self.graph(run=self.of(texts)).logits, self.graph(self.graph.read_texts(texts))
        expected = run.logits.to(found.device)
        half = any(node.model.dtype != torch.float32 for node in self.graph.nodes.values())
        limit = (COARSE if half else TOLERANCE) * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=0, atol=limit):
            kinds = sorted({node.model.config.model_type for node in self.graph.nodes.values()})
            raise TrainingError(
                f"a graph of {', '.join(kinds)} does not replay: scores differ by "
                f"{float((found - expected).abs().max()):.2g}; train with keep=None"
            )


@dataclass
class ReplayRun:
    """One batch of a replay; see `signals.Run`."""

    replay: Replay
    texts: Mapping[str, Sequence[Read]]

    @property
    def rows(self) -> int:
        """See `signals.Run`."""
        return len(next(iter(self.texts.values())))

    def states(self, name: str, hear: Hear | None) -> tuple[Tensor, Tensor]:
        """See `signals.Run`."""
        node = self.replay.graph.nodes[name]
        rows = [self.replay.kept.row(name, text) for text in self.texts[name]]
        if hear is None:
            return _padded([row[STATES] for row in rows], node.device)
        assert isinstance(node, FrozenNode)
        if node.node.position == "all":
            return self._whole(node, rows, hear)
        entering_B1D = torch.stack([row[ENTERING] for row in rows]).to(node.device)
        entering_B1D = entering_B1D + hear(entering_B1D)
        last_B1D = self.replay.upper[name].run(entering_B1D, self._last(node, rows))
        if node.node.pooling == "last":
            return last_B1D, torch.ones(last_B1D.shape[:2])
        before_BTD, mask_BT = _padded([row[BEFORE] for row in rows], node.device)
        mask = torch.cat([mask_BT, torch.ones(len(rows), 1)], 1)
        return torch.cat([before_BTD, last_B1D.to(before_BTD.dtype)], 1), mask

    def _batch(self, node: FrozenNode) -> dict[str, Tensor]:
        tokenizer = self.replay.graph.members[node.name].tokenizer
        return tokenize(node.name, tokenizer, self.texts[node.name], None)

    def _whole(
        self, node: FrozenNode, rows: Sequence[Mapping[str, Tensor]], hear: Hear
    ) -> tuple[Tensor, Tensor]:
        entering_BTD, mask = _padded([row[ENTERING] for row in rows], node.device)
        entering_BTD = entering_BTD + hear(entering_BTD)
        arguments = node.arguments(self._batch(node))
        return self.replay.upper[node.name].run(entering_BTD, arguments), mask

    def _last(self, node: FrozenNode, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Arguments of a pass of the last token alone, over kept keys and values."""
        batch = self._batch(node)
        mask = batch["attention_mask"].to(node.device)
        arguments: dict[str, Any] = {
            "input_ids": batch["input_ids"][:, -1:].to(node.device),
            "attention_mask": mask,
            "use_cache": True,
            cache_argument(node.model): _cache(node, rows, mask.shape[1] - 1),
        }
        if "position_ids" in accepted_arguments(node.model):
            arguments["position_ids"] = mask.sum(-1, keepdim=True) - 1
        return arguments


def _padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pads (T, D) on the left; returns (B, T, D) and what is real (B, T)."""
    width = max(len(row) for row in rows)
    mask = torch.zeros(len(rows), width)
    for place, row in enumerate(rows):
        mask[place, width - len(row) :] = 1
    padded = [nn.functional.pad(row, (0, 0, width - len(row), 0)) for row in rows]
    return torch.stack(padded).to(device), mask


def _cache(node: FrozenNode, rows: Sequence[Mapping[str, Tensor]], width: int) -> DynamicCache:
    """A cache that holds kept keys and values in the upper blocks, and as many zeros below."""
    cache = DynamicCache(config=node.model.config.get_text_config(decoder=True))
    if not width:
        return cache
    nothing = torch.zeros(len(rows), 1, width, 1, dtype=node.model.dtype, device=node.device)
    for layer, held in enumerate(cache.layers):
        if f"k{layer}" not in rows[0]:
            held.update(nothing, nothing)
            continue
        both = [
            torch.stack(
                [
                    nn.functional.pad(one, (0, 0, width - one.shape[1], 0))
                    for one in (row[f"{kind}{layer}"] for row in rows)
                ]
            ).to(node.device)
            for kind in "kv"
        ]
        held.update(*both)
    return cache
