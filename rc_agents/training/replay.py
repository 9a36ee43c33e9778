"""Training steps that run the anchor alone, from the first site up; what lies below and beside is replayed from disk.

Shapes: B rows, T tokens of a row, D width, P positions that predict a label, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rc_agents import sources
from rc_agents.backbone import Encoded, StandIn, find_blocks, returns_tuple, share_weights
from rc_agents.errors import TrainingError
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import ANCHOR
from rc_agents.training.data import Encoded as Example
from rc_agents.training.labelled import only_at, predicting
from rc_agents.training.states import StateStore

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit
COARSE = 3e-2  # the same in half precision, where another batch size may take another kernel


class Upper:
    """The anchor above a block, entered with hidden states; its weights are the anchor's own."""

    def __init__(self, anchor: PreTrainedModel, layer: int) -> None:
        self.model = share_weights(anchor)
        self.model.eval()
        self.entering: Tensor = torch.empty(0)
        blocks = find_blocks(self.model)
        returns = returns_tuple(anchor, layer)
        for index in range(layer):
            last = index == layer - 1
            blocks[index] = StandIn(blocks[index], self._enter if last else None, returns)

    def _enter(self) -> Tensor:
        return self.entering

    def logits(self, states_BTD: Tensor, batch: Mapping[str, Tensor], keep_BT: Tensor) -> Tensor:
        """Returns the logits (P, V) at the kept positions."""
        self.entering = states_BTD
        try:
            with only_at(self.model, keep_BT):
                output = self.model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    use_cache=False,
                )
        finally:
            self.entering = torch.empty(0)
        return output.logits[0]


class ReplayPass:
    """Runs training batches on stored states.

    Args:
        model: a unilateral ensemble.
        datasets: the encoded examples by the names that batches give as `dataset`.
        folder: of the store; what is missing there is computed first.
        progress: show a bar while states are computed.

    Raises:
        TrainingError: another topology, a folder that cannot be written, or an anchor that cannot be entered half-way.
    """

    def __init__(
        self,
        model: CoupledForCausalLM,
        datasets: Mapping[str, Sequence[Example]],
        folder: str | Path,
        *,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.datasets = datasets
        self.store = StateStore(model, Path(folder), progress)
        self.store.complete([one for examples in datasets.values() for one in examples])
        layers = [row[0] for row in model.sites]
        self.first = layers[0]
        self.upper = Upper(model.models[ANCHOR], self.first)
        blocks = find_blocks(self.upper.model)
        for site, layer in enumerate(layers[1:], start=1):
            blocks[layer - 1].register_forward_hook(self._hook(site))
        self._reads: dict[str, Tensor] | None = None
        self._encoded: dict[str, Encoded] = {}
        self._check(next(name for name, examples in datasets.items() if examples))

    def logits(self, batch: Mapping[str, Any], *, coupled: bool = True) -> Tensor:
        """Returns the logits (P, V) that predict the batch's labelled tokens, row by row.

        Args:
            batch: `input_ids`, `attention_mask` and `labels`, (B, T); `rows` (B,), the examples' places in `dataset`.
            coupled: whether the bridges speak; the frozen anchor otherwise, without gradient.
        """
        examples = self.datasets[batch["dataset"]]
        states = self.store.rows([examples[int(row)] for row in batch["rows"]])
        keep_BT = predicting(batch["labels"])
        device, width = self.model.device, batch["input_ids"].shape[1]
        placed = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        states = {
            name: nn.functional.pad(value, (0, 0, 0, width - value.shape[1])).to(device)
            for name, value in states.items()
        }
        entering = states[ANCHOR]
        if not coupled:
            with torch.no_grad():
                return self.upper.logits(entering, placed, keep_BT)
        self._reads, self._encoded = states, self._encode(batch)
        try:
            return self.upper.logits(self._updated(0, entering), placed, keep_BT)
        finally:
            self._reads, self._encoded = None, {}

    def _encode(self, batch: Mapping[str, Any]) -> dict[str, Encoded]:
        """Runs the encoders on what the batch's examples bring; their states at the anchor's positions are learnt."""
        shown = sources.named(self.model, batch.get("sources"), {})
        rows = len(batch["input_ids"])
        return {name: sources.encode(self.model, name, one, rows) for name, one in shown.items()}

    def _updated(self, site: int, target_BTD: Tensor) -> Tensor:
        assert self._reads is not None
        updated = target_BTD
        for edge in self.model.edges:
            bridge = self.model.bridge(edge, site)
            if edge.source in self._encoded:
                encoded, device = self._encoded[edge.source], target_BTD.device
                mask_BS = encoded.mask.to(device)
                pool: Any = bridge.pool
                read = pool(encoded.states[site].to(device), mask_BS, target_BTD)
            elif edge.source in self.model.config.encoder_names:
                continue  # no row has anything to see
            else:
                read = self._reads[f"{edge.source}.{site}"]
            updated = updated + bridge(read, target_BTD, updated)
        return updated

    def _hook(self, site: int) -> Any:
        def after_block(module: nn.Module, args: Any, output: Any) -> Any:
            if self._reads is None:
                return None
            if isinstance(output, tuple):
                return (self._updated(site, output[0]), *output[1:])
            return self._updated(site, output)

        return after_block

    @torch.no_grad()
    def _check(self, dataset: str) -> None:
        """Raises unless a replayed pass gives what the whole ensemble gives, on the first example."""
        example = self.datasets[dataset][0]
        ids = torch.tensor([example.ids])
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids,
            "rows": torch.tensor([0]),
            "dataset": dataset,
            "sources": {name: [one] for name, one in (example.sources or {}).items()},
        }
        found = self.logits(batch)
        ids = ids.to(self.model.device)
        expected = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), sources=batch["sources"]
        ).logits[0, :-1]
        if not torch.allclose(
            found,
            expected.to(found.device),
            rtol=0,
            atol=TOLERANCE.get(self.model.dtype, COARSE) * float(expected.abs().max()),
        ):
            kind = self.model.models[ANCHOR].config.model_type
            raise TrainingError(
                f"an anchor of type {kind!r} cannot be entered half-way: train without states="
            )
