"""How bridges are trained, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rc_agents.errors import TrainingError

SCHEDULES = ("cosine", "linear", "constant")
DISTILL_ON = ("pairs", "texts", "both")
_WORDS = {"schedule": SCHEDULES, "distill_on": DISTILL_ON}
FUSED = "fused"
"""The teacher that is the mean of the frozen anchor's and the frozen specialists' probabilities."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has, whatever it trains.

    Args:
        steps: optimizer steps.
        learning_rate: peak for linear maps.
        schedule: after the warm-up: cosine or linear to zero, or constant.
        warmup: share of the steps until the peak.
        weight_decay: on the maps only.
        max_grad_norm: clipping; 0 for none.
        batch_size: examples a batch.
        gradient_accumulation: batches a step; under `accelerate launch` each process has as many.
        eval_steps: steps between two looks at the validation loss; 0 for a tenth of all.
        patience: looks without a new best after which training stops; None to go on to the end.
        bf16: run the models under bfloat16 autocast; what trains stays float32.
        save_steps: steps between checkpoints; 0 for none.
        keep: checkpoints to keep.
        log_steps: steps between two lines of metrics; 0 for a tenth of all, at most 10.
        report_to: transformers' reporters, such as `tensorboard`.
        seed: of the order of the data.

    Raises:
        TrainingError: a value out of range; the message names it.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 16
    gradient_accumulation: int = 1
    eval_steps: int = 0
    patience: int | None = None
    bf16: bool = False
    save_steps: int = 0
    keep: int = 2
    log_steps: int = 0
    report_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_numbers()
        for name, known in _WORDS.items():
            if getattr(self, name, known[0]) not in known:
                raise TrainingError(
                    f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}"
                )
        if isinstance(self.report_to, str):
            raise TrainingError(
                f"report_to is a list of reporters, as in ({self.report_to!r},), not a text"
            )

    def _check_numbers(self) -> None:
        for name in (name for name in _COUNTS if hasattr(self, name)):
            value, least = getattr(self, name), _COUNTS[name]
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                rule = "positive" if least == 1 else f"at least {least}"
                raise TrainingError(f"{name} must be {rule}, a whole number, not {value!r}")
        for name in (name for name in (*_RATES, *_WEIGHTS) if hasattr(self, name)):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TrainingError(f"{name} must be a number, not {value!r}")
            if not math.isfinite(value) or value < 0 or (name in _RATES and not value):
                rule = "positive" if name in _RATES else "at least 0"
                raise TrainingError(f"{name} must be {rule}, not {value!r}")
        for name in ("warmup", "validation_share"):
            if getattr(self, name, 0) >= 1:
                raise TrainingError(f"{name} is a share below 1, not {getattr(self, name)!r}")

    @property
    def logged_every(self) -> int:
        """Steps between two lines of metrics."""
        return self.log_steps or max(1, min(10, self.steps // 10))

    @property
    def evaluated_every(self) -> int:
        """Steps between two looks at the validation loss."""
        return self.eval_steps or max(1, self.steps // 10)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """How bridges are trained.

    The loss of a batch is the weighted sum of its terms, each a mean over its positions in nats: `answer` (answers of
    pairs) or `text` (next token), `distill` (KL from a teacher) and `retain` (KL from the frozen anchor).

    What `RunConfig` has, and:

    Args:
        gate_learning_rate: peak for the gates.
        pool_learning_rate: peak for what reads an encoder's positions (`bridges.QueryPool`); that of the maps where
            left out.
        mix_learning_rate: peak for routers and the output mix; that of the gates where left out.
        base_learning_rate: peak for the base models, which train with `train_bases=True` alone.
        max_length: the longest pair in tokens; a batch has `batch_size` pairs.
        text_batch_size, block_length: blocks of text a batch, and their length in tokens.
        mix: share of the batches by group of records, documents being the group `text`.
        answer_weight, text_weight: factors on the loss of pairs and of text.
        distill_from: a specialist whose own distribution is taught, or `fused`; None for none.
        distill_weight: factor on the KL from it.
        distill_on: whether pairs, texts or both are taught by it.
        retain_weight: factor on the KL from the frozen anchor; it needs the `retain` text.
        retain_batch_size: blocks of general text a batch.
        retain_positions: of which at most so many tokens, drawn anew each time, count; None for all. The output
            layer is most of what they cost.
        validation_share: share of the records, by hash of the document, that is held out; 0 for none.
        checkpoint_activations: recompute the blocks' insides in the backward pass, for long sequences.

    Raises:
        TrainingError: a value out of range; the message names it.
    """

    gate_learning_rate: float = 1e-2
    pool_learning_rate: float | None = None
    mix_learning_rate: float | None = None
    base_learning_rate: float = 1e-5
    max_length: int = 256
    text_batch_size: int = 4
    block_length: int = 128
    mix: Mapping[str, float] | None = None
    answer_weight: float = 1.0
    text_weight: float = 1.0
    distill_from: str | None = None
    distill_weight: float = 1.0
    distill_on: str = "pairs"
    retain_weight: float = 1.0
    retain_batch_size: int = 4
    retain_positions: int | None = None
    validation_share: float = 0.0
    checkpoint_activations: bool = False


_COUNTS = {
    "steps": 1,
    "batch_size": 1,
    "max_length": 1,
    "text_batch_size": 1,
    "block_length": 2,
    "gradient_accumulation": 1,
    "retain_batch_size": 1,
    "retain_positions": 1,
    "eval_steps": 0,
    "patience": 1,
    "save_steps": 0,
    "keep": 1,
    "log_steps": 0,
    "seed": 0,
}
_RATES = (
    "learning_rate",
    "gate_learning_rate",
    "pool_learning_rate",
    "mix_learning_rate",
    "base_learning_rate",
)
_WEIGHTS = (
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "answer_weight",
    "text_weight",
    "distill_weight",
    "retain_weight",
    "validation_share",
)
_OPTIONAL = ("pool_learning_rate", "mix_learning_rate", "retain_positions", "patience")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    Args:
        steps: optimizer steps done.
        loss: mean over the last tenth of the logged steps.
        seconds: wall time of the training loop in this process.
        trained_parameters: values that were trained.
        history: the logged metrics of the steps, oldest first.
        evaluations: the validation losses by step, oldest first; empty without validation.
        best_step: the step whose bridges the ensemble has now; the last one without validation.
    """

    steps: int
    loss: float
    seconds: float
    trained_parameters: int
    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
