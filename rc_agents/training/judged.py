"""A transformers Trainer that judges by a validation set, keeps the best of it and resumes to the same bits.

Its steps' own business, the loss and what trains at which rate, is that of its children.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from rc_agents.errors import TrainingError
from rc_agents.training.config import RunConfig
from rc_agents.training.resuming import ResumableTrainer
from rc_agents.training.tally import Tally, means

LOSS, VALIDATION = "loss", "eval_loss"


class JudgedTrainer(ResumableTrainer):
    """Trains some parameters of a model that stays as it is otherwise.

    Args:
        model: the model.
        settings: how to train.
        parameters: what trains, by name.
        items: the batches of all steps.
        validation: batches to judge by; none where empty.
        identity: what a run must have in common with one it goes on with, for JSON.
        callbacks: more transformers callbacks.
        progress: show a progress bar.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        settings: RunConfig,
        parameters: dict[str, nn.Parameter],
        items: torch.utils.data.Dataset[Any],
        validation: Sequence[Any],
        identity: dict[str, Any],
        callbacks: Sequence[Any],
        progress: bool,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=items,
            eval_dataset=list(validation) or None,
            data_collator=lambda batch: batch[0],
            callbacks=list(callbacks),
        )
        self.judged = list(validation)
        self.settings, self.parameters, self.identity = settings, parameters, identity
        self.tally = Tally()
        self.best: dict[str, Tensor] = {}
        self.remove_callback(PrinterCallback)
        if progress:
            self.add_callback(_Bar)

    # What a child says.

    def judge(self, batch: Any) -> tuple[float, int]:
        """Returns the sum of the loss over what is judged in a validation batch, and how many that is."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns an optimizer's groups, each of one rate."""
        raise NotImplementedError

    # A step.

    def take(self, name: str, value: Tensor) -> None:
        """Notes a term of the loss.

        Raises:
            TrainingError: it is not a number.
        """
        number = value.item()
        if not math.isfinite(number):
            raise TrainingError(
                f"the loss is no longer a number at step {self.state.global_step + 1} ({name}): lower "
                f"learning_rate={self.settings.learning_rate}, or look for broken weights"
            )
        self.tally.add(name, number)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Bfloat16 autocast where it is asked for."""
        if not self.settings.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One batch forth and back; behind the last of a step the gradients are averaged over the processes."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            average_gradients(list(self.parameters.values()))
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW with a rate for each group."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.parameter_groups())
        return self.optimizer

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Keeps accelerate from wrapping the frozen models: only the few trained gradients cross processes."""
        return Undivided(self.model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.is_over():  # a resumed run may be
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # What is seen of it.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms, gates and norms; leaves out seconds, so that a resumed run has the same history."""
        if "train_runtime" in logs:
            return
        if LOSS in logs:
            logs |= means(gather_object([self.tally.state()]))
            self.tally.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Returns the mean loss over the validation set; keeps what was best on it."""
        total, count = 0.0, 0
        rank, world = self.args.process_index, self.args.world_size
        for batch in self.judged[rank::world]:
            with self.compute_loss_context_manager():
                part, number = self.judge(self._prepare_inputs(batch))
            total += part
            count += number
        found = gather_object([(total, count)])
        metrics = {VALIDATION: sum(t for t, _ in found) / sum(n for _, n in found)}
        self.log(dict(metrics))
        if self.best_step() == self.state.global_step:
            self.best = {name: one.detach().cpu().clone() for name, one in self.parameters.items()}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.is_over():
            self.control.should_training_stop = True
        return metrics

    def evaluations(self) -> list[dict[str, Any]]:
        """Returns the validation losses so far, oldest first."""
        return [entry for entry in self.state.log_history if VALIDATION in entry]

    def best_step(self) -> int:
        """Returns the first step of the lowest validation loss; the last step without validation."""
        found = self.evaluations()
        if not found:
            return self.state.global_step
        return min(found, key=lambda entry: (entry[VALIDATION], entry["step"]))["step"]

    def is_over(self) -> bool:
        """Whether the validation loss had no new best for `patience` looks."""
        since = [entry for entry in self.evaluations() if entry["step"] > self.best_step()]
        return self.settings.patience is not None and len(since) >= self.settings.patience

    @torch.no_grad()
    def restore_best(self) -> None:
        """Puts what was best on the validation set back."""
        for name, tensor in self.best.items():
            self.parameters[name].copy_(tensor)


class Undivided(nn.Module):
    """A model that runs as it is in every process."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        return self.model(*args, **kwargs)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Averages the gradients over the processes, all in one tensor; none counts as zero."""
    device = parameters[0].device
    each = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.to(device).reshape(-1) for grad in each])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for parameter, part in zip(parameters, flat.split([g.numel() for g in each]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.device)


class _Bar(ProgressCallback):
    """A bar with the losses beside it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the losses."""
        if self.training_bar is not None:
            shown = {name: f"{value:.4g}" for name, value in logs.items() if LOSS in name}
            self.training_bar.set_postfix(shown)
