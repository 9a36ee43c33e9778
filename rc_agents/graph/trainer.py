"""The steps of a graph's training, and what is seen of them: gradients, routing, and whether projections specialise."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import TrainingArguments

from ..training.data import Pair
from ..training.judged import LOSS, JudgedTrainer
from .asking import OneRun, answer
from .model import LatentGraph
from .signals import GraphOutput
from .speaking import spoken

GRADIENT, ROUTING, SIMILARITY, WEIGHT = "gradient", "routing", "similarity", "weight"


class Steps(torch.utils.data.Dataset[list[Any]]):
    """One item a batch: every example once an epoch, in an order that the seed decides.

    Args:
        examples: to learn from.
        batch_size: of them.
        count: batches of the run.
        seed: of the order.
    """

    def __init__(self, examples: Sequence[Any], batch_size: int, count: int, seed: int) -> None:
        self.examples = examples
        order: list[int] = []
        epoch = 0
        while len(order) < count * batch_size:
            places = list(range(len(examples)))
            random.Random(f"{seed}:{epoch}").shuffle(places)
            order += places
            epoch += 1
        self.plan = [order[at * batch_size : (at + 1) * batch_size] for at in range(count)]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> list[Any]:
        return [self.examples[place] for place in self.plan[number]]


class _Trained(nn.Module):
    """A graph without its config, into which a transformers Trainer would write."""

    def __init__(self, graph: LatentGraph) -> None:
        super().__init__()
        self.graph = graph

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the graph's."""
        return self.graph.state_dict(*args, **kwargs)


class GraphTrainer(JudgedTrainer):
    """Trains edges and output.

    Args:
        model: the graph.
        args: in the words of transformers.
        run_of: where states come from; the models themselves where None.
        others: as for `JudgedTrainer`.
    """

    def __init__(
        self, model: LatentGraph, args: TrainingArguments, *, run_of: OneRun | None, **others: Any
    ) -> None:
        super().__init__(_Trained(model), args, **others)
        self.graph, self.run_of = model, run_of

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the mean cross-entropy of a batch, in nats a question or a token."""
        loss, output = self._loss(inputs)
        self.take(f"{LOSS}/answer", loss.detach())
        if (self.state.global_step + 1) % self.settings.logged_every == 0:
            self._look(output)
        return (loss.to(self.args.device), output) if return_outputs else loss.to(self.args.device)

    def _loss(self, batch: Sequence[Any]) -> tuple[Tensor, GraphOutput]:
        if isinstance(batch[0], Pair):
            batches, labels = spoken(self.graph, batch)
            output: GraphOutput = self.graph(batches, labels=labels)
            assert output.loss is not None
            return output.loss, output
        scores_BK, output = answer(self.graph, batch, self.run_of)
        labels_B = torch.tensor([one.label for one in batch], device=scores_BK.device)
        return cross_entropy(scores_BK.float(), labels_B), output

    def judge(self, batch: Sequence[Any]) -> tuple[float, int]:
        """Returns the loss summed over the batch's examples, and their number."""
        return self._loss(batch)[0].item() * len(batch), len(batch)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Edges; output; strengths, gates and weights of aggregates."""
        config: Any = self.settings
        rates = {
            "edges": config.learning_rate,
            "output": config.output_learning_rate or config.learning_rate,
            "gates": config.gate_learning_rate,
        }
        kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
        for name, parameter in self.parameters.items():
            kinds[_kind(name)].append(parameter)
        decays = {"edges": config.weight_decay, "output": config.weight_decay, "gates": 0.0}
        return [
            {"params": members, "lr": rates[kind], "weight_decay": decays[kind], "kind": kind}
            for kind, members in kinds.items()
            if members
        ]

    # What is seen.

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One batch forth and back; the gradient that reached each projection is noted before it is clipped."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if (self.state.global_step + 1) % self.settings.logged_every == 0:
            for name, share in gradient_shares(self.graph).items():
                self.tally.add(f"{GRADIENT}/{name}", share)
        return loss

    @torch.no_grad()
    def _look(self, output: GraphOutput) -> None:
        """Notes routing weights, weights of the aggregates, and how alike what two nodes write is."""
        routing_N = output.routing.flatten(0, 2).mean(0)
        for name, share in zip(self.graph.config.read, routing_N.tolist(), strict=True):
            self.tally.add(f"{ROUTING}/{name}", share)
        for one, other in itertools.combinations(sorted(output.signals.written), 2):
            pair = [output.signals.written[name].cpu() for name in (one, other)]
            self.tally.add(f"{SIMILARITY}/{one}/{other}", float(cosine_similarity(*pair).mean()))
        for name, weights_BS in output.signals.weights.items():
            for source, share in zip(
                self.graph.config.nodes[name].hears, weights_BS.mean(0).tolist(), strict=True
            ):
                self.tally.add(f"{WEIGHT}/{name}/{source}", share)


def _kind(name: str) -> str:
    if name.startswith("readout."):
        return "output"
    last = name.rsplit(".", 1)[-1]
    return "gates" if last in ("value", "query", "bias") or ".gate." in name else "edges"


def gradient_shares(graph: LatentGraph) -> dict[str, float]:
    """Returns the norm of the gradient that reached each projection, as a share of the output's."""
    whole = _norm(graph.readout)
    parts = {f"encode/{name}": module for name, module in graph.encode.items()}
    parts |= {f"hear/{name}": module for name, module in graph.hear.items()}
    return {name: _norm(module) / whole if whole else 0.0 for name, module in parts.items()}


def _norm(module: nn.Module) -> float:
    grads = [one.grad.float().norm().cpu() for one in module.parameters() if one.grad is not None]
    return float(torch.stack(grads).norm()) if grads else 0.0
