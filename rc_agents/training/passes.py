"""Where an objective gets its logits from: the seam between what is taught and how the ensemble is run.

Shapes: B rows, T tokens of a row, C columns with a label in some row, P labelled tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from rc_agents import backbone, placement
from rc_agents.execution import inputs
from rc_agents.modeling import CoupledForCausalLM

Batch = Mapping[str, Any]
"""`input_ids`, `attention_mask`, `labels` (B, T), -100 where nothing is scored; the logits at t - 1 predict label t.

`rows` (B,) are the examples' indices in their data set, and `dataset` is its name: `data`, `retain` or `validation`.
"""


class Pass(Protocol):
    """Runs the ensemble for the objectives, which know nothing else of it."""

    def logits(self, batch: Batch, *, coupled: bool = True) -> Tensor:
        """Returns the logits (P, V) that predict the labelled tokens, row by row; not coupled, the frozen anchor's."""


class WholePass:
    """The ensemble as it is, every model run anew; only labelled columns go through the output layer."""

    def __init__(self, model: CoupledForCausalLM) -> None:
        self.model = model

    def logits(self, batch: Batch, *, coupled: bool = True) -> Tensor:
        """Returns the logits (P, V) that predict the labelled tokens; the frozen anchor's carry no gradient."""
        scored_BT = scored(batch["labels"])
        columns_C = scored_BT.any(0).nonzero()[:, 0]
        with contextlib.ExitStack() as modes:
            if not coupled:
                modes.enter_context(torch.no_grad())
                modes.enter_context(self.model.disabled())
            output = self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                logits_to_keep=columns_C,
            )
        return picked(output.logits, scored_BT[:, columns_C])


def scored(labels_BT: Tensor) -> Tensor:
    """Returns whether the logits at each position but the last predict a labelled token, (B, T - 1)."""
    return labels_BT[:, 1:] != -100


def targets(batch: Batch) -> Tensor:
    """Returns the labelled tokens (P) in the order of a pass's logits."""
    labels_BT = batch["labels"]
    return labels_BT[:, 1:][scored(labels_BT)]


def picked(logits_BCV: Tensor, scored_BC: Tensor) -> Tensor:
    """Returns the logits (P, V) of the scored positions, row by row."""
    return logits_BCV[scored_BC.to(logits_BCV.device)]


@torch.no_grad()
def own_logits(model: CoupledForCausalLM, name: str, batch: Batch) -> Tensor:
    """Returns one frozen model's own logits (P, V), nobody speaking to it; it reads the anchor's tokens.

    Args:
        model: the ensemble.
        name: one of its models, of the anchor's vocabulary.
        batch: what to read.
    """
    single = model.models[name]
    scored_BT = scored(batch["labels"])
    columns_C = scored_BT.any(0).nonzero()[:, 0]
    accepted = backbone.accepted_arguments(single)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    tensors = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in accepted:
        tensors["position_ids"] = inputs.positions(mask, ids, 0)
    if "logits_to_keep" in accepted:
        tensors["logits_to_keep"] = columns_C
    device = placement.input_device(single)
    logits = single(
        **{key: value.to(device) for key, value in tensors.items()}, use_cache=False
    ).logits
    if "logits_to_keep" not in accepted:
        logits = logits[:, columns_C]
    return picked(logits, scored_BT[:, columns_C])
