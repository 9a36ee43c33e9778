"""Ensembles of tiny models, and what tests do to them."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import rc_agents
from rc_agents import CoupledForCausalLM
from tests.tiny import tiny
from tests.tiny_tokenizers import tiny_tokenizer

VOCABULARY = 96
NAMES = ("medical", "law", "code", "prose")


def ensemble(
    *archs: str, awake: bool = True, seed: int = 0, width: int | None = None, **settings: Any
) -> CoupledForCausalLM:
    """Couples tiny models that share one vocabulary, the anchor's architecture first.

    Args:
        archs: the architectures; every model has weights of its own.
        awake: whether the bridges speak (random weights) or are as new.
        seed: of the bridges.
        width: of every model, its own by default.
        settings: more arguments of `rc_agents.couple`.
    """
    anchor, *rest = (tiny(arch, seed=number, width=width) for number, arch in enumerate(archs))
    specialists = dict(zip(NAMES, rest, strict=False))
    model = rc_agents.couple(anchor, specialists, **{"alignment": "shared", "sites": 2, **settings})
    if awake:
        wake(model, seed)
    return model


def wake(model: CoupledForCausalLM, seed: int = 0) -> None:
    """Gives every parameter of the bridges, routers and mixer random values that are heard."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def prompts(rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Random tokens without special ones, (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def padded(lengths: tuple[int, ...], side: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths with id 0 beside them: (input_ids, attention_mask), each (B, T)."""
    ids = prompts(len(lengths), max(lengths), seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        gap = slice(0, ids.shape[1] - length) if side == "left" else slice(length, None)
        mask[row, gap] = 0
    return ids * mask, mask


def frozen_logits(model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The model's own logits, at the positions that a mask gives."""
    arguments = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
    if mask is not None and "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(**arguments).logits


def own_state(model: CoupledForCausalLM) -> dict[str, Tensor]:
    """A copy of every tensor that is not a frozen model's."""
    state = model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if not name.startswith("lm_")}


@contextmanager
def unchanged_bases(model: CoupledForCausalLM) -> Iterator[None]:
    """Fails when a base weight changes inside the block."""
    before = model.base_fingerprint()
    yield
    assert model.base_fingerprint() == before


GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def talking(*specialists: str, room: int = 2048) -> rc_agents.CoupledForCausalLM:
    """A tiny ensemble with a chat template whose bridges speak, and which never ends an answer by itself.

    Args:
        specialists: names of up to two.
        room: tokens that every model takes.
    """
    torch.manual_seed(0)  # of the bridges
    tokenizer = tiny_tokenizer("prose")
    size = len(tokenizer)
    kinds = dict(zip(specialists, ("qwen2", "mistral"), strict=False))
    models = {
        name: tiny(arch, vocab_size=size, seed=number)
        for number, (name, arch) in enumerate(kinds.items(), start=1)
    }
    model = rc_agents.couple(
        tiny("llama", vocab_size=size),
        models,
        tokenizers=dict.fromkeys(("anchor", *specialists), tokenizer),
        bridge={"start": "default", "gate": "fixed"},
    )
    model.generation_config.eos_token_id = None
    for one in model.models.values():
        one.config.max_position_embeddings = room
    return model
