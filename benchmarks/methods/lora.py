"""LoRA on the anchor: as many trained parameters as the bridges, the same data, steps and retention term."""

from __future__ import annotations

from typing import Any

import torch
from rc_agents.benchmarks.methods.bench import Bench, Fitted
from rc_agents.benchmarks.methods.search import searched
from rc_agents.benchmarks.methods.tuning import Batch, LastStates, Lessons, tune
from torch import Tensor, nn

from rc_agents.scoring import CausalScorer
from rc_agents.training.labelled import only_at


def lora(bench: Bench) -> Fitted:
    """Low-rank updates of the anchor's own layers (Hu et al., 2021), by PEFT."""
    wanted = sum(parameter.numel() for _, parameter in bench.couple().trainable_parameters())
    names, rank = shape(bench.frozen.models["anchor"], wanted)
    lessons = Lessons(bench)
    frozen = LastStates([bench.frozen.models["anchor"]], lessons)

    def fit(rate: float, steps: int | None) -> Fitted:
        adapted = _adapted(bench, names, rank)
        base = adapted.get_base_model()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]

        def logits(batch: Batch) -> Tensor:
            with only_at(base, batch.keep_BT):
                return base(**batch.tensors, use_cache=False).logits[0]

        config = bench.training(rate, steps)
        loss = tune(trained, logits, lambda batch: frozen.logprobs(batch)[0], lessons, config)
        count = sum(parameter.numel() for parameter in trained)
        return Fitted(
            scorer=CausalScorer(base, bench.tokenizer, trained_parameters=count),
            parameters=count,
            steps=config.steps,
            notes={"rank": rank, "layers": names, "of_the_bridges": count / wanted, "loss": loss},
            model=adapted,
        )

    return searched(bench, bench.setting.rates["lora"], fit)


def _adapted(bench: Bench, names: list[str], rank: int) -> Any:
    """Returns a fresh copy of the anchor with a new adapter."""
    import peft

    anchor = bench.anchor_copy()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed)
        return peft.get_peft_model(anchor, config).eval()


def shape(model: Any, wanted: int) -> tuple[list[str], int]:
    """Returns the layers and the rank whose parameters come closest to `wanted`: all linear layers where within 10 %.

    Args:
        model: without adapters.
        wanted: parameters.
    """
    head = model.get_output_embeddings()
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            leaf = name.rsplit(".", 1)[-1]
            sizes[leaf] = sizes.get(leaf, 0) + module.in_features + module.out_features
    choices = [list(sizes), [n for n in sizes if n in ("q_proj", "k_proj", "v_proj", "o_proj")]]
    choices += [[name] for name in sizes]
    best: tuple[float, list[str], int] | None = None
    for names in choices:
        each = sum(sizes[name] for name in names)
        if not each:
            continue
        rank = max(1, round(wanted / each))
        miss = abs(rank * each / wanted - 1)
        if miss <= 0.1:
            return names, rank
        if best is None or miss < best[0]:
            best = miss, names, rank
    assert best is not None, "the anchor has no linear layer"
    return best[1], best[2]
