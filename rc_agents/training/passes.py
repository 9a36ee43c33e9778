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
from rc_agents.topology import ANCHOR
from rc_agents.training.labelled import only_at, predicting

Batch = Mapping[str, Any]
"""`input_ids`, `attention_mask`, `labels` (B, T), -100 where nothing is scored; the logits at t - 1 predict label t.

`sources`, where encoders are shown something, has for each a list with the inputs of every row.

`rows` (B,) are the examples' indices in their data set, and `dataset` is its name: `data`, `retain` or `validation`.
"""


READ = ("input_ids", "attention_mask", "sources")
"""What of a batch the ensemble is called with."""


class Pass(Protocol):
    """Runs the ensemble for the objectives, which know nothing else of it."""

    def logits(self, batch: Batch, *, coupled: bool = True) -> Tensor:
        """Returns the logits (P, V) that predict the labelled tokens, row by row; not coupled, the frozen anchor's."""


class WholePass:
    """The ensemble as it is, every model run anew; only labelled positions go through the anchor's output layer.

    Where logits are mixed, those of every column that has a label in some row are computed, and picked from after.
    """

    def __init__(self, model: CoupledForCausalLM) -> None:
        self.model = model

    def logits(self, batch: Batch, *, coupled: bool = True) -> Tensor:
        """Returns the logits (P, V) that predict the labelled tokens; the frozen anchor's carry no gradient."""
        read = {name: batch[name] for name in READ if name in batch}
        with contextlib.ExitStack() as modes:
            if not coupled:
                modes.enter_context(torch.no_grad())
                modes.enter_context(self.model.disabled())
            if self.model.mixer.kind == "anchor":
                modes.enter_context(only_at(self.model.models[ANCHOR], predicting(batch["labels"])))
                return self.model(**read).logits[0]
            scored_BT = predicting(batch["labels"])
            columns_C = scored_BT.any(0).nonzero()[:, 0]
            logits_BCV = self.model(**read, logits_to_keep=columns_C).logits
            return logits_BCV[scored_BT[:, columns_C].to(logits_BCV.device)]


def targets(batch: Batch) -> Tensor:
    """Returns the labelled tokens (P) in the order of a pass's logits."""
    labels_BT = batch["labels"]
    return labels_BT[:, 1:][labels_BT[:, 1:] != -100]


@torch.no_grad()
def own_logits(model: CoupledForCausalLM, name: str, batch: Batch) -> Tensor:
    """Returns one frozen model's own logits (P, V), nobody speaking to it; it reads the anchor's tokens.

    Args:
        model: the ensemble.
        name: one of its models, of the anchor's vocabulary.
        batch: what to read.
    """
    single = model.models[name]
    tensors = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if "position_ids" in backbone.accepted_arguments(single):
        tensors["position_ids"] = inputs.positions(batch["attention_mask"], batch["input_ids"], 0)
    device = placement.input_device(single)
    placed = {key: value.to(device) for key, value in tensors.items()}
    with only_at(single, predicting(batch["labels"])):
        return single(**placed, use_cache=False).logits[0]
