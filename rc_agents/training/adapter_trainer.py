"""A transformers Trainer for packed pairs and blocks of text.

Shapes: P positions with a label, V vocabulary.
"""

import inspect
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback

from rc_agents.errors import TrainingError
from rc_agents.training.data import TEXT_GROUP, Batch, Encoded, pack, pad


class AdapterTrainer(Trainer):
    """Trains on packed pairs, whose logits are only computed where a label is, and on plain blocks."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the mean loss over the labels of the batch."""
        if "targets" not in inputs:
            outputs = model(**inputs, use_cache=False)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        logits_PV = packed_logits(model, inputs)
        loss = cross_entropy(logits_PV.float(), inputs["targets"])
        return (loss, logits_PV) if return_outputs else loss


@torch.no_grad()
def can_pack(model: Any, examples: Sequence[Encoded]) -> bool:
    """Returns whether packing gives this model's own logits, tried on its two longest pairs.

    It does not where a model has no attention mask to hide one pair from another (state spaces), or
    a sliding window that a pair is longer than.
    """
    pairs = sorted((e for e in examples if e.group != TEXT_GROUP), key=lambda e: len(e.ids))[-2:]
    if not {"attention_mask", "position_ids"} <= set(inspect.signature(model.forward).parameters):
        return False
    for count in range(1, len(pairs) + 1):
        batch = pack(pairs[-count:])
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        alone = pad(pairs[-1:])["input_ids"].to(model.device)
        start, size = pairs[-1].answer_start, len(pairs[-1].ids) - pairs[-1].answer_start
        expected_PV = model(alone, use_cache=False).logits[0, start - 1 : -1]
        found_PV = packed_logits(model, inputs)[-size:]
        if not torch.allclose(
            found_PV, expected_PV, rtol=1e-2, atol=1e-2 * float(expected_PV.abs().max())
        ):
            return False
    return True


def packed_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Returns the logits (P, V) at the labelled positions of a packed batch."""
    inputs = {
        name: batch[name]
        for name in ("input_ids", "inputs_embeds", "position_ids")
        if name in batch
    }
    mask = batch["attention_mask"].to(model.dtype)
    kept = batch["label_positions"]
    if "logits_to_keep" in inspect.signature(_forward(model)).parameters:
        return model(**inputs, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits[0]
    return model(**inputs, attention_mask=mask, use_cache=False).logits[0, kept]


def _forward(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).forward


class LossWatch(TrainerCallback):
    """Times the run and stops it as soon as the loss is not a number."""

    seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Reads it, and the loss."""
        self.seconds = time.perf_counter() - self._start
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise TrainingError(
                f"the loss is not a number at step {state.global_step}: lower "
                f"learning_rate={args.learning_rate}, or look for broken weights"
            )
