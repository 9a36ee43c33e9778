"""A learned mixture of the models' next-token distributions: what coupling at the output alone can do.

log p = sum_m w_m log p_m + const, with w the softmax of one value a model, or of a linear read of all models' last
states at each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rc_agents.benchmarks.methods.bench import Bench, Fitted, NotApplicable
from rc_agents.benchmarks.methods.search import searched
from rc_agents.benchmarks.methods.tuning import Batch, LastStates, Lessons, tune
from torch import Tensor, nn

from rc_agents.scoring import MixtureScorer


class Weights(nn.Module):
    """The models' weights.

    Args:
        widths: of their states.
        reads: whether the weights depend on the states, which are RMS-normalised.
    """

    def __init__(self, widths: Sequence[int], reads: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(len(widths)))
        self.reads = nn.ParameterList(
            [nn.Parameter(torch.zeros(width, len(widths))) for width in widths if reads]
        )

    def forward(self, states: Sequence[Tensor], logprobs: Sequence[Tensor]) -> Tensor:
        """(P, D_m) states and (P, V) log-probabilities of each model -> logits (P, V)."""
        values = self.values.expand(len(states[0]), -1)
        for state, read in zip(states, self.reads, strict=False):
            values = values + nn.functional.rms_norm(state, (state.shape[-1],)) @ read
        weights = values.softmax(-1)
        return sum((weights[:, m, None] * one for m, one in enumerate(logprobs)), torch.zeros(()))


def mean_logit_ensemble(bench: Bench) -> Fitted:
    """Equal weights: nothing is learned."""
    _check(bench)
    models = list(bench.frozen.models.values())
    widths = [model.get_output_embeddings().in_features for model in models]
    weights = Weights(widths, reads=False).to(models[0].device)
    return Fitted(scorer=MixtureScorer(models, bench.tokenizer, weights))


def logit_ensemble(bench: Bench) -> Fitted:
    """One learned weight a model."""
    return _fit(bench, "logit_ensemble", reads=False)


def token_logit_ensemble(bench: Bench) -> Fitted:
    """Weights that read both models' states at every token."""
    return _fit(bench, "token_logit_ensemble", reads=True)


def _check(bench: Bench) -> None:
    if any(how == "span" for how in bench.frozen.config.alignment.values()):
        raise NotApplicable("the models' vocabularies differ, so their logits cannot be mixed")
    sizes = [model.config.get_text_config().vocab_size for model in bench.frozen.models.values()]
    if len(set(sizes)) > 1:
        raise NotApplicable(
            f"the models' vocabularies have {sizes} tokens, so their logits cannot be mixed"
        )


def _fit(bench: Bench, name: str, *, reads: bool) -> Fitted:
    _check(bench)
    models = list(bench.frozen.models.values())
    lessons = Lessons(bench)
    last = LastStates(models, lessons)
    if not last.are_logits():
        raise NotApplicable("a model changes its logits behind the output layer")
    widths = [model.get_output_embeddings().in_features for model in models]

    def fit(rate: float, steps: int | None) -> Fitted:
        weights = Weights(widths, reads).to(models[0].device)

        def logits(batch: Batch) -> Tensor:
            return weights([state.float() for state in last.states(batch)], last.logprobs(batch))

        config = bench.training(rate, steps)
        trained = list(weights.parameters())
        loss = tune(trained, logits, lambda batch: last.logprobs(batch)[0], lessons, config)
        count = sum(parameter.numel() for parameter in trained)
        shown = [round(value, 4) for value in weights.values.softmax(-1).tolist()]
        return Fitted(
            scorer=MixtureScorer(models, bench.tokenizer, weights, trained_parameters=count),
            parameters=count,
            steps=config.steps,
            notes={"loss": loss, "weights": shown},
        )

    return searched(bench, bench.setting.rates[name], fit)
