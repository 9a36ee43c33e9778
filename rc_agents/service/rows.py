"""What is decided for each row before it is generated."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import context, selection
from ..errors import ContextError, InputError
from ..modeling import CoupledForCausalLM
from ..topology import ANCHOR
from .params import GenerationParams
from .prompts import Prompt

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt with all that concerns it alone.

    Attributes:
        limit: tokens it may generate.
        seed: of its samples.
    """

    prompt: Prompt
    params: GenerationParams
    limit: int
    seed: int

    @property
    def size(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.token_ids)


def context_limit(
    model: CoupledForCausalLM, names: Collection[str] | None = None
) -> tuple[str, int] | None:
    """Returns the model with the shortest context and that context, among those that read the anchor's tokens.

    A model with a tokenizer of its own counts in its own tokens; the forward pass checks those.

    Args:
        names: the specialists that take part; None for all.
    """
    limits = {}
    for name, member in model.models.items():
        length = context.limit_of(member.config)
        own_tokens = (model.config.alignment or {}).get(name) == "span"
        takes_part = names is None or name == ANCHOR or name in names
        if length is not None and takes_part and not own_tokens:
            limits[name] = length
    return min(limits.items(), key=lambda item: item[1]) if limits else None


def plan_row(
    model: CoupledForCausalLM, prompt: Prompt, params: GenerationParams, number: int
) -> Row:
    """Decides a row's limit and seed.

    Args:
        number: what to add to the seed.

    Raises:
        InputError: too long for a model, or an unknown specialist.
    """
    if not isinstance(params, GenerationParams):
        raise InputError(f"params is a GenerationParams, got {type(params).__name__}")
    check_choice(model, params)
    beyond = [one for one in params.logit_bias or () if one >= model.config.vocab_size]
    if beyond:
        raise InputError(
            f"logit_bias names token {beyond[0]}; the anchor's ids end at {model.config.vocab_size - 1}"
        )
    seed = int(torch.randint(1 << 62, ())) if params.seed is None else params.seed + number
    return Row(prompt=prompt, params=params, limit=_limit(model, prompt, params), seed=seed)


def check_choice(model: CoupledForCausalLM, params: GenerationParams) -> None:
    """Raises `InputError` where specialists or strengths name none of the ensemble's."""
    names = None if params.specialists is None else [params.specialists]
    strength = None if params.strength is None else [params.strength]
    selection.choose(model.edges, model.names, 1, names, strength)


def _limit(model: CoupledForCausalLM, prompt: Prompt, params: GenerationParams) -> int:
    _check_own_contexts(model, prompt, params)
    size, asked = len(prompt.token_ids), params.max_new_tokens
    default = model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    shortest = context_limit(model, params.specialists)
    if shortest is None:
        return asked or default
    name, length = shortest
    if size >= length:
        raise ContextError(
            f"the prompt has {size} tokens and model {name!r} takes at most {length}, the answer included; shorten it"
        )
    if asked is not None and size + asked > length:
        raise ContextError(
            f"the prompt has {size} tokens and max_new_tokens={asked}, together {size + asked}, but model {name!r} "
            f"takes at most {length}; shorten one of them"
        )
    return asked or min(default, length - size)


def _check_own_contexts(
    model: CoupledForCausalLM, prompt: Prompt, params: GenerationParams
) -> None:
    """Raises where the prompt is too long for a model that reads it in tokens of its own."""
    for name in model.config.span_names:
        limit = context.limit_of(model.models[name].config)
        if limit is None or (params.specialists is not None and name not in params.specialists):
            continue
        script = None if prompt.chat is None else prompt.chat.script(name)
        text = (
            model.tokenizer.decode(list(prompt.token_ids))
            if script is None
            else script.text.decode("utf-8", "replace")
        )
        if len(text.encode()) < limit:
            continue  # a token is at least a byte
        size = len(model.tokenizers[name](text, add_special_tokens=script is None)["input_ids"])
        if size >= limit:
            raise ContextError(
                f"the prompt has {size} tokens for model {name!r}, which takes at most {limit}, the answer included; "
                "shorten it, or answer without that model"
            )


def fit_together(model: CoupledForCausalLM, rows: Sequence[Row]) -> bool:
    """Whether every model that some row asks for has room for every row, prompt and answer."""
    shortest = context_limit(model, _asked_for(rows))
    return shortest is None or all(row.size + row.limit <= shortest[1] for row in rows)


def shown_alike(rows: Sequence[Row]) -> bool:
    """Whether what encoders are shown has one size in all rows that show something, as a picture's has."""
    sizes: dict[tuple[str, str], Any] = {}
    each = [one for row in rows for one in row.prompt.sources.items()]
    found = [
        ((name, key), value.shape if isinstance(value, torch.Tensor) else value)
        for name, inputs in each
        for key, value in inputs.items()
    ]
    return all(sizes.setdefault(key, size) == size for key, size in found)


def _asked_for(rows: Sequence[Row]) -> set[str] | None:
    """The specialists that some row asks for; None for all."""
    named = [row.params.specialists for row in rows]
    everybody = any(names is None for names in named)
    return None if everybody else {name for names in named for name in names or ()}


def groups(model: CoupledForCausalLM, rows: Sequence[Row]) -> list[list[Row]]:
    """Returns all rows as one group, or each alone where they do not fit the context or encoders side by side."""
    if not rows:
        return []
    if not shown_alike(rows):
        return [[row] for row in rows]
    shortest = context_limit(model, _asked_for(rows))
    columns = max(row.size for row in rows) + max(row.limit for row in rows)
    if shortest is None or columns <= shortest[1]:
        return [list(rows)]
    return [[row] for row in rows]
