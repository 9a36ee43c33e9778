"""What bridges are taught: each term of the loss a class, each value a mean over positions in nats.

answer, text: -log q(token). distill: KL(teacher || q). retain: KL(frozen anchor || q). q is what the ensemble predicts.
Shapes: P labelled tokens, V vocabulary, N models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from rc_agents.errors import TrainingError, nearest
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import ANCHOR
from rc_agents.training.config import FUSED, TrainConfig
from rc_agents.training.passes import Batch, Pass, own_logits, targets


@dataclass
class Step:
    """One batch and what the passes over it gave, each run when first asked for.

    Args:
        runner: runs the ensemble.
        batches: `data` and, where there is text to retain, `retain`.
        kind: of the data: `pairs` or `texts`.
    """

    runner: Pass
    batches: dict[str, Batch]
    kind: str
    _found: dict[tuple[str, bool], Tensor] = field(default_factory=dict)

    def coupled(self, dataset: str) -> Tensor:
        """Returns the ensemble's logits (P, V) in float32."""
        return self._logits(dataset, True)

    def frozen(self, dataset: str) -> Tensor:
        """Returns the frozen anchor's logits (P, V) in float32."""
        return self._logits(dataset, False)

    def _logits(self, dataset: str, coupled: bool) -> Tensor:
        if (dataset, coupled) not in self._found:
            logits = self.runner.logits(self.batches[dataset], coupled=coupled)
            self._found[dataset, coupled] = logits.float()
        return self._found[dataset, coupled]


class Objective(Protocol):
    """One term of the loss."""

    name: str
    weight: float

    def concerns(self, step: Step) -> bool:
        """Whether the batch has this term."""

    def __call__(self, step: Step) -> Tensor:
        """Returns its value, a scalar."""


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the labelled tokens: of answers alone in pairs, of every token in texts."""

    name: str
    weight: float
    kind: str

    def concerns(self, step: Step) -> bool:
        """Whether the batch is of its kind."""
        return step.kind == self.kind

    def __call__(self, step: Step) -> Tensor:
        """Returns the mean over the labelled tokens."""
        logits_PV = step.coupled("data")
        return cross_entropy(logits_PV, targets(step.batches["data"]).to(logits_PV.device))


@dataclass(frozen=True)
class Distillation:
    """KL from a teacher's distribution to the ensemble's, at the labelled tokens.

    Args:
        model: the ensemble, whose frozen models teach.
        teachers: the models whose probabilities are averaged.
        weight: of the term.
        kinds: the kinds of batches that are taught.
    """

    model: CoupledForCausalLM
    teachers: Sequence[str]
    weight: float
    kinds: Sequence[str]
    name: str = "distill"

    def concerns(self, step: Step) -> bool:
        """Whether the batch is of a kind that is taught."""
        return step.kind in self.kinds

    def __call__(self, step: Step) -> Tensor:
        """Returns the mean over the labelled tokens."""
        logits_PV = step.coupled("data")
        each = [self._own(name, step).to(logits_PV.device) for name in self.teachers]
        logs_NPV = torch.stack([logits.log_softmax(-1) for logits in each])
        teacher_PV = logs_NPV.logsumexp(0) - math.log(len(each))
        return divergence(teacher_PV, logits_PV)

    def _own(self, name: str, step: Step) -> Tensor:
        if name == ANCHOR:
            return step.frozen("data")
        return own_logits(self.model, name, step.batches["data"]).float()


@dataclass(frozen=True)
class Retention:
    """KL from the frozen anchor to the ensemble on general text: what the specialists know nothing of stays."""

    weight: float
    name: str = "retain"

    def concerns(self, step: Step) -> bool:
        """Whether the batch has general text."""
        return "retain" in step.batches

    def __call__(self, step: Step) -> Tensor:
        """Returns the mean over the labelled tokens."""
        return divergence(step.frozen("retain").log_softmax(-1), step.coupled("retain"))


def divergence(teacher_PV: Tensor, logits_PV: Tensor) -> Tensor:
    """KL(teacher || softmax(logits)), the mean over P; the teacher in log-probabilities."""
    return kl_div(logits_PV.log_softmax(-1), teacher_PV, reduction="batchmean", log_target=True)


def objectives_of(
    config: TrainConfig, model: CoupledForCausalLM, kinds: set[str], *, retains: bool
) -> list[Objective]:
    """Returns the terms that a run has.

    Args:
        config: their weights.
        model: the ensemble.
        kinds: what the data holds: `pairs`, `texts`.
        retains: whether there is text to retain.

    Raises:
        TrainingError: an unknown teacher, one of another vocabulary, or data that no term looks at.
    """
    taught = ("pairs", "texts") if config.distill_on == "both" else (config.distill_on,)
    found: list[Any] = [
        NextToken("answer", config.answer_weight, "pairs"),
        NextToken("text", config.text_weight, "texts"),
    ]
    if config.distill_from is not None:
        teachers = _teachers(config.distill_from, model)
        found.append(Distillation(model, teachers, config.distill_weight, taught))
    looked_at = {one.kind for one in found[:2] if one.weight}
    if config.distill_from is not None and config.distill_weight:
        looked_at |= set(taught)
    if unseen := sorted(kinds - looked_at):
        raise TrainingError(
            f"the data holds {' and '.join(unseen)} that no loss looks at; raise answer_weight, text_weight or "
            "distill_weight, or leave that data out"
        )
    if retains:
        found.append(Retention(config.retain_weight))
    return [one for one in found if one.weight]


def _teachers(name: str, model: CoupledForCausalLM) -> list[str]:
    if name != FUSED and name not in model.specialists:
        raise TrainingError(f"distill_from={name!r}: {nearest(name, [FUSED, *model.specialists])}")
    if name in model.config.encoder_names:
        raise TrainingError(
            f"distill_from={name!r}: an encoder predicts no tokens; name a specialist that reads the text"
        )
    wanted = list(model.readers) if name == FUSED else [name]
    for one in wanted[name == FUSED :]:
        how = (model.config.alignment or {}).get(one, "shared")
        size = model.models[one].config.get_text_config(decoder=True).vocab_size
        if how != "shared" or size != model.config.vocab_size:
            raise TrainingError(
                f"distill_from={name!r}: {one!r} has another vocabulary than the anchor, and distributions are "
                "compared token by token; name a specialist that shares the anchor's tokenizer"
            )
    return wanted
