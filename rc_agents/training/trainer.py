"""A transformers Trainer for bridges: terms of a loss, rates by group, exact resume, gradients averaged by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from rc_agents.training.config import TrainConfig
from rc_agents.training.judged import LOSS, JudgedTrainer
from rc_agents.training.objectives import Objective, Step
from rc_agents.training.parameters import groups
from rc_agents.training.passes import Batch, Pass, targets
from rc_agents.training.probe import Probe


class BridgeTrainer(JudgedTrainer):
    """Trains what `parameters` names of an ensemble, whose models stay as they are.

    Args:
        model: the ensemble.
        args: in the words of transformers.
        objectives: the terms of the loss.
        runner: runs the ensemble for them.
        others: as for `JudgedTrainer`.
    """

    settings: TrainConfig

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        objectives: Sequence[Objective],
        runner: Pass,
        parameters: dict[str, nn.Parameter],
        **others: Any,
    ) -> None:
        super().__init__(model, args, parameters=parameters, **others)
        self.objectives, self.runner, self.probe = objectives, runner, Probe(model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the weighted sum of the terms of one batch."""
        batches = {name: inputs[name] for name in ("data", "retain") if name in inputs}
        step = Step(self.runner, batches, inputs["kind"])
        with self._listening(inputs["data"]):
            logits_PV = step.coupled("data")
        terms = {one.name: (one.weight, one(step)) for one in self.objectives if one.concerns(step)}
        for name, (_, value) in terms.items():
            self.take(f"{LOSS}/{name}", value)
        loss = sum(weight * value for weight, value in terms.values())
        loss = loss.to(self.args.device)
        return (loss, {"logits": logits_PV}) if return_outputs else loss

    def _listening(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        if (self.state.global_step + 1) % self.settings.logged_every:
            return contextlib.nullcontext()
        return self.probe.listening(batch["attention_mask"], self.tally.add)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Maps, gates, mix and routers, bases."""
        return groups(self.parameters, self.settings)

    def judge(self, batch: Batch) -> tuple[float, int]:
        """Returns the summed loss and the number of labelled tokens."""
        logits_PV = self.runner.logits(batch).float()
        wanted_P = targets(batch).to(logits_PV.device)
        return cross_entropy(logits_PV, wanted_P, reduction="sum").item(), len(wanted_P)
