"""Training for methods without bridges: the data, loss, plan and schedule of the bridges' trainer, on one model.

Loss of a step: cross-entropy of the answers plus `retain_weight` times KL(frozen anchor || method) on what is
retained. Shapes: B rows, T tokens, P positions that predict a label, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rc_agents.benchmarks.methods.bench import Bench
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import get_cosine_schedule_with_warmup

from rc_agents.scoring.causal import outputs_at
from rc_agents.training import data
from rc_agents.training.bridges import TrainConfig
from rc_agents.training.labelled import predicting


@dataclass(frozen=True)
class Batch:
    """Padded examples.

    Attributes:
        dataset: `pairs` or `retained`.
        rows: the examples' places in it, (B,).
        tensors: input_ids and attention_mask, (B, T).
        keep_BT: the positions that predict a label.
        targets_P: what they predict.
    """

    dataset: str
    rows: Sequence[int]
    tensors: dict[str, Tensor]
    keep_BT: Tensor
    targets_P: Tensor


Logits = Callable[[Batch], Tensor]


@dataclass
class Lessons:
    """The encoded training data of a bench: the same examples that its bridges see."""

    bench: Bench
    sets: dict[str, list[data.Encoded]] = field(init=False)

    def __post_init__(self) -> None:
        config = self.bench.recipe.train
        sizes = {"max_length": config.max_length, "block_length": config.block_length}
        records = {"pairs": self.bench.lessons(), "retained": self.bench.retained()}
        self.sets = {
            name: data.encode(self.bench.tokenizer, found, **sizes)
            for name, found in records.items()
        }

    def batch(self, dataset: str, rows: Sequence[int]) -> Batch:
        """Returns examples side by side."""
        found = data.pad([self.sets[dataset][row] for row in rows])
        ids = found["input_ids"]
        labels = found["labels"]
        tensors = {
            "input_ids": ids,
            "attention_mask": found.get("attention_mask", torch.ones_like(ids)),
        }
        device = self.bench.frozen.device
        return Batch(
            dataset,
            rows,
            {name: value.to(device) for name, value in tensors.items()},
            predicting(labels),
            labels[:, 1:][labels[:, 1:] != -100].to(device),
        )

    def plans(self, config: TrainConfig) -> Iterable[tuple[list[int], list[int]]]:
        """Returns for each step the rows of both data sets."""
        pairs = data.plan(
            self.sets["pairs"],
            batch_size=config.batch_size,
            text_batch_size=config.text_batch_size,
            steps=config.steps,
            seed=config.seed,
        )
        if not config.retain_weight:
            return ((rows, []) for rows in pairs)
        size = config.retain_batch_size
        retained = data.plan(
            self.sets["retained"],
            batch_size=size,
            text_batch_size=size,
            steps=config.steps,
            seed=config.seed + 1,
        )
        return zip(pairs, retained, strict=True)


@dataclass
class LastStates:
    """What frozen models give to their output layers at every labelled position, computed once and kept in memory.

    Args:
        models: frozen, with one tokenizer.
        lessons: the data.
    """

    models: Sequence[Any]
    lessons: Lessons
    found: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    def states(self, batch: Batch) -> list[Tensor]:
        """Returns each model's states at the batch's labelled positions, (P, D) each."""
        for row in batch.rows:
            if (batch.dataset, row) not in self.found:
                one = self.lessons.batch(batch.dataset, [row])
                self.found[batch.dataset, row] = [
                    outputs_at(model, one.keep_BT, {**one.tensors, "use_cache": False})[0]
                    for model in self.models
                ]
        rows = [self.found[batch.dataset, row] for row in batch.rows]
        return [torch.cat([row[place] for row in rows]) for place in range(len(self.models))]

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> list[Tensor]:
        """Returns each model's log-probabilities there, (P, V) each."""
        pairs = zip(self.models, self.states(batch), strict=True)
        return [
            model.get_output_embeddings()(states).float().log_softmax(-1) for model, states in pairs
        ]

    @torch.no_grad()
    def are_logits(self) -> bool:
        """Whether the output layer alone makes the logits: nothing scales or caps them behind it."""
        one = self.lessons.batch("pairs", [0])
        for model, mine in zip(self.models, self.logprobs(one), strict=True):
            _, logits, _ = outputs_at(model, one.keep_BT, {**one.tensors, "use_cache": False})
            if not torch.allclose(mine, logits.float().log_softmax(-1), atol=1e-3):
                return False
        return True


def tune(
    parameters: Sequence[nn.Parameter],
    logits: Logits,
    frozen: Callable[[Batch], Tensor],
    lessons: Lessons,
    config: TrainConfig,
    *,
    slow: Sequence[nn.Parameter] = (),
) -> float:
    """Trains parameters in place; returns the mean loss of the last tenth of the steps.

    Args:
        parameters: trained at `config.learning_rate`.
        logits: of the method, (P, V).
        frozen: log-probabilities of the frozen anchor, (P, V).
        lessons: the data.
        config: of the bridges' trainer.
        slow: more parameters, trained at `config.gate_learning_rate`.
    """
    groups = [
        {"params": list(parameters), "lr": config.learning_rate},
        {"params": list(slow), "lr": config.gate_learning_rate},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    warmup = math.ceil(config.warmup * config.steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, config.steps)
    trained = [*parameters, *slow]
    losses = []
    for pairs, retained in lessons.plans(config):
        batch = lessons.batch("pairs", pairs)
        loss = cross_entropy(logits(batch).float(), batch.targets_P)
        losses.append(float(loss.detach()))
        if config.retain_weight:
            kept = lessons.batch("retained", retained)
            mine = logits(kept).float().log_softmax(-1)
            far = kl_div(mine, frozen(kept), reduction="batchmean", log_target=True)
            loss = loss + config.retain_weight * far
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        schedule.step()
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
