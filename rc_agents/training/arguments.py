"""A training config in the words of transformers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from rc_agents.training.config import TrainConfig

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def arguments(config: TrainConfig, folder: Path, *, evaluates: bool) -> TrainingArguments:
    """Returns the arguments of a run that keeps its checkpoints in `folder`."""
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,  # an item of the data set is a whole batch already
        gradient_accumulation_steps=config.gradient_accumulation,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULERS[config.schedule],
        warmup_steps=math.ceil(config.warmup * config.steps),
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.logged_every,
        logging_nan_inf_filter=False,  # a loss that is not a number ends the run
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.evaluated_every,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or config.steps,
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),  # several processes then meet by gloo
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,  # the trainer brings a bar of its own
        dataloader_pin_memory=False,
    )
    made._n_gpu = 1  # DataParallel would copy the frozen models to every device
    return made
