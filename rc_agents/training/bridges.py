"""Train the bridges of an ensemble on `transformers.Trainer`: the bases stay frozen, gates learn at their own rate.

Loss of a step: cross-entropy of the answers (or of the text) plus `retain_weight` times KL(frozen anchor || ensemble)
on general text, which keeps the anchor's behaviour where the specialists have nothing to say.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import Trainer, TrainerCallback, TrainingArguments

from rc_agents.errors import TrainingError
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.training import data as training_data

LOG = "training.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How bridges are trained.

    Args:
        steps: optimizer steps.
        learning_rate: peak for the bridges' maps.
        gate_learning_rate: peak for gates, routers and the mix.
        warmup: share of the steps until the peak; cosine after.
        weight_decay: on the maps only.
        batch_size, max_length: pairs a step, and the longest pair in tokens.
        text_batch_size, block_length: blocks of text a step, and their length in tokens.
        mix: share of the steps by group of records, documents being the group `text`.
        retain_weight: factor on the KL term; 0 for none.
        retain_batch_size: blocks of general text a step.
        max_grad_norm: clipping.
        seed: of the order of the data.
        save_steps: steps between checkpoints; 0 for none.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    gate_learning_rate: float = 1e-2
    warmup: float = 0.05
    weight_decay: float = 0.0
    batch_size: int = 16
    max_length: int = 256
    text_batch_size: int = 4
    block_length: int = 128
    mix: Mapping[str, float] | None = None
    retain_weight: float = 1.0
    retain_batch_size: int = 4
    max_grad_norm: float = 1.0
    seed: int = 0
    save_steps: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "learning_rate",
            "gate_learning_rate",
            "batch_size",
            "max_length",
            "text_batch_size",
        ):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be positive, not {getattr(self, name)!r}")
        if self.retain_weight < 0 or self.retain_batch_size < 1 or self.block_length < 2:
            raise TrainingError(
                "retain_weight must be at least 0, retain_batch_size at least 1, block_length at least 2"
            )


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    Args:
        steps: optimizer steps done.
        loss: mean over the last tenth of the logged steps.
        seconds: wall time of the training loop.
        trained_parameters: values that were trained.
        history: the logged metrics.
    """

    steps: int
    loss: float
    seconds: float
    trained_parameters: int
    history: list[dict[str, Any]]


def train(
    model: CoupledForCausalLM,
    data: str | Path | Iterable[training_data.Record | Mapping[str, Any]],
    output: str | Path | None = None,
    config: TrainConfig | None = None,
    *,
    retain: str | Path | Iterable[training_data.Record | Mapping[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> TrainResult:
    """Trains the bridges, gates, routers and mix of `model` in place, and saves it to `output`.

    Args:
        model: an ensemble; base weights are never changed.
        data: whatever `rc_agents.training.data.read` takes: pairs (loss on the answers) and texts.
        output: folder for the trained ensemble and its log; nothing is saved where left out.
        retain: general text on which the ensemble shall stay the frozen anchor.
        callbacks: more transformers callbacks.

    Raises:
        TrainingError: nothing to train, no tokenizer, or a loss that is no longer a number.
        DataError: no data, or malformed.
    """
    config = config or TrainConfig()
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise TrainingError(
            "training needs the anchor's tokenizer with an end-of-text token; pass tokenizers= to couple"
        )
    trained = sum(parameter.numel() for _, parameter in model.trainable_parameters())
    if not trained:
        raise TrainingError(
            "the ensemble has nothing to train: no edges, or every map and gate is fixed"
        )
    batches = _Batches(
        tokenizer,
        training_data.read(data),
        None if retain is None else training_data.read(retain),
        config,
    )
    scratch = Path(output or "rc_agents_run").with_name(
        Path(output or "rc_agents_run").name + ".unfinished"
    )
    trainer = _Trainer(
        model=model,
        args=_arguments(config, scratch, progress),
        train_dataset=batches,
        data_collator=lambda items: items[0],
        callbacks=[_StopOnNaN(), *callbacks],
    )
    trainer.coupling = config
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.eval()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = [entry["loss"] for entry in history[-max(1, len(history) // 10) :]]
    if output is not None:
        _save(model, Path(output), config, history)
    shutil.rmtree(scratch, ignore_errors=True)
    return TrainResult(
        steps=trainer.state.global_step,
        loss=sum(last) / len(last) if last else math.nan,
        seconds=seconds,
        trained_parameters=trained,
        history=history,
    )


def _save(
    model: CoupledForCausalLM, output: Path, config: TrainConfig, history: list[dict[str, Any]]
) -> None:
    model.save_pretrained(output)
    lines = [json.dumps({"config": asdict(config)}), *(json.dumps(entry) for entry in history)]
    (output / LOG).write_text("\n".join(lines) + "\n", encoding="utf-8")


class _Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One item a step: a padded batch of pairs or a batch of blocks, and blocks of text to retain."""

    def __init__(
        self,
        tokenizer: Any,
        records: list[training_data.Record],
        retain: list[training_data.Record] | None,
        config: TrainConfig,
    ) -> None:
        sizes = {"max_length": config.max_length, "block_length": config.block_length}
        steps = {
            "batch_size": config.batch_size,
            "text_batch_size": config.text_batch_size,
            "steps": config.steps,
        }
        self.examples = training_data.encode(tokenizer, records, **sizes)
        self.steps = training_data.plan(self.examples, **steps, seed=config.seed, mix=config.mix)
        self.retained: list[training_data.Encoded] = []
        if retain is not None and config.retain_weight:
            self.retained = training_data.encode(tokenizer, retain, **sizes)
            steps |= {
                "batch_size": config.retain_batch_size,
                "text_batch_size": config.retain_batch_size,
            }
            self.retain_steps = training_data.plan(self.retained, **steps, seed=config.seed + 1)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        batch = pad([self.examples[index] for index in self.steps[step]])
        if self.retained:
            kept = pad([self.retained[index] for index in self.retain_steps[step]])
            batch |= {"retain_ids": kept["input_ids"], "retain_mask": kept["attention_mask"]}
        return batch


def pad(examples: Sequence[training_data.Encoded]) -> dict[str, Tensor]:
    """Right-pads examples: input_ids, attention_mask and labels, (B, T) each; -100 before each answer."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        labels[row, example.answer_start : length] = ids[row, example.answer_start : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _arguments(config: TrainConfig, folder: Path, progress: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,  # an item of the data set is a whole batch already
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup * config.steps),
        max_grad_norm=config.max_grad_norm,
        logging_steps=max(1, min(10, config.steps // 10)),
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or config.steps,
        save_total_limit=1,
        seed=config.seed,
        report_to="none",
        disable_tqdm=not progress,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = 1  # DataParallel would copy the frozen models to every device
    return arguments


class _Trainer(Trainer):
    """Adds the retention term and a learning rate of their own for the gates."""

    coupling: TrainConfig

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            maps: list[nn.Parameter] = []
            gates: list[nn.Parameter] = []
            for name, parameter in self.model.trainable_parameters():
                (maps if ".map." in name else gates).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": maps,
                        "lr": self.coupling.learning_rate,
                        "weight_decay": self.coupling.weight_decay,
                    },
                    {"params": gates, "lr": self.coupling.gate_learning_rate, "weight_decay": 0.0},
                ]
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        retain_ids, retain_mask = inputs.pop("retain_ids", None), inputs.pop("retain_mask", None)
        outputs = model(**inputs)
        loss = outputs.loss
        if retain_ids is not None:
            loss = loss + self.coupling.retain_weight * retention(
                self.model, retain_ids, retain_mask
            )
        return (loss, outputs) if return_outputs else loss


def retention(model: CoupledForCausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """KL(frozen anchor || ensemble) in nats a token on (B, T) text."""
    with torch.no_grad(), model.disabled():
        frozen = (
            model(input_ids=input_ids, attention_mask=attention_mask).logits.float().log_softmax(-1)
        )
    coupled = (
        model(input_ids=input_ids, attention_mask=attention_mask).logits.float().log_softmax(-1)
    )
    real = attention_mask.bool().to(coupled.device)
    return kl_div(coupled[real], frozen[real], reduction="batchmean", log_target=True)


class _StopOnNaN(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise TrainingError(
                f"the loss is no longer a number at step {state.global_step}: "
                f"lower learning_rate ({args.learning_rate})"
            )
