"""Rows of one `generate` call: what is decided for each before it, and the call itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from .. import context, selection
from ..errors import InputError
from ..modeling import CoupledForCausalLM
from .decoding import RowSampling, Sink, Watch, row_processors
from .guides import Guided, Guiding, vocabulary
from .params import GenerationParams
from .prompts import Prompt
from .reading import RowReader

DEFAULT_MAX_NEW_TOKENS = 256
_VOCABULARIES: WeakKeyDictionary[Any, tuple[tuple[int, ...], Any]] = WeakKeyDictionary()
"""Tokenizers as guides read them, which takes a second to make."""
CONTEXT_TOKENS = 4  # of a plain text's end, enough to decode what follows as its continuation


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


def context_limit(model: CoupledForCausalLM) -> tuple[str, int] | None:
    """Returns the model with the shortest context and that context, among those that read the anchor's tokens.

    A model with a tokenizer of its own counts in its own tokens; the forward pass checks those.
    """
    limits = {}
    for name, member in model.models.items():
        length = context.limit_of(member.config)
        own_tokens = (model.config.alignment or {}).get(name) == "span"
        if length is not None and not own_tokens:
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
    seed = int(torch.randint(1 << 62, ())) if params.seed is None else params.seed + number
    return Row(prompt=prompt, params=params, limit=_limit(model, prompt, params), seed=seed)


def check_choice(model: CoupledForCausalLM, params: GenerationParams) -> None:
    """Raises `InputError` where specialists or strengths name none of the ensemble's."""
    names = None if params.specialists is None else [params.specialists]
    strength = None if params.strength is None else [params.strength]
    selection.choose(model.edges, model.names, 1, names, strength)


def _limit(model: CoupledForCausalLM, prompt: Prompt, params: GenerationParams) -> int:
    size, asked = len(prompt.token_ids), params.max_new_tokens
    default = model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    shortest = context_limit(model)
    if shortest is None:
        return asked or default
    name, length = shortest
    if size >= length:
        raise InputError(
            f"the prompt has {size} tokens and model {name!r} takes at most {length}, the answer included; shorten it"
        )
    if asked is not None and size + asked > length:
        raise InputError(
            f"the prompt has {size} tokens and max_new_tokens={asked}, together {size + asked}, but model {name!r} "
            f"takes at most {length}; shorten one of them"
        )
    return asked or min(default, length - size)


def groups(model: CoupledForCausalLM, rows: Sequence[Row]) -> list[list[Row]]:
    """Returns all rows as one group, or each alone where they do not fit the context side by side."""
    if not rows:
        return []
    shortest = context_limit(model)
    columns = max(row.size for row in rows) + max(row.limit for row in rows)
    if shortest is None or columns <= shortest[1]:
        return [list(rows)]
    return [[row] for row in rows]


def run(
    model: CoupledForCausalLM,
    rows: Sequence[Row],
    stopped: Callable[[], bool],
    sink: Sink | None = None,
) -> list[RowReader]:
    """Generates all rows in one call; returns their readers, ended.

    Args:
        stopped: asked before the call and at each step; True ends all rows.
        sink: takes text as it settles.
    """
    eos = _end_tokens(model)
    width = max(row.size for row in rows)
    readers = [_reader(model, row, eos) for row in rows]
    guidings = _guidings(model, rows, eos)
    timeouts = [row.params.timeout for row in rows]
    watch = Watch(readers, width, timeouts, stopped, sink, guidings)
    if stopped():
        watch.finish("cancelled")
        return readers
    ids, mask = _padded(model, rows, width)
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        specialists=_given([row.params.specialists for row in rows]),
        strength=_given([row.params.strength for row in rows]),
        chats=_given([row.prompt.chat for row in rows]),
        logits_processor=_sampling(model, rows, width, guidings),
        stopping_criteria=StoppingCriteriaList([watch]),
        max_new_tokens=max(row.limit for row in rows),
        eos_token_id=eos or None,
        pad_token_id=_padding(model),
        do_sample=False,  # a row that samples leaves one token to choose
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
        max_length=None,
        stop_strings=None,
    )
    watch.finish("length")
    return readers


def _reader(model: CoupledForCausalLM, row: Row, eos: Sequence[int]) -> RowReader:
    before = row.prompt.token_ids[-CONTEXT_TOKENS:] if row.prompt.continues else ()
    return RowReader(model.tokenizer, row.limit, eos, row.params.stop, before)


def _end_tokens(model: CoupledForCausalLM) -> list[int]:
    known = model.generation_config.eos_token_id
    ids = known if isinstance(known, list) else [known]
    return sorted({one for one in [*ids, model.tokenizer.eos_token_id] if one is not None})


def _padding(model: CoupledForCausalLM) -> int:
    """Any id that the anchor embeds does, as the mask hides it."""
    own = [model.tokenizer.pad_token_id, model.generation_config.pad_token_id]
    choices = [one for one in [*own, *_end_tokens(model), 0] if one is not None]
    return next(one for one in choices if 0 <= one < model.config.vocab_size)


def _padded(
    model: CoupledForCausalLM, rows: Sequence[Row], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    padding = _padding(model)
    ids = [[padding] * (width - row.size) + list(row.prompt.token_ids) for row in rows]
    mask = [[0] * (width - row.size) + [1] * row.size for row in rows]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def _guidings(
    model: CoupledForCausalLM, rows: Sequence[Row], eos: Sequence[int]
) -> list[Guiding | None]:
    if all(row.params.guide is None for row in rows):
        return [None] * len(rows)
    known = _vocabulary(model, tuple(eos))
    return [None if row.params.guide is None else Guiding(known, row.params.guide) for row in rows]


def _vocabulary(model: CoupledForCausalLM, eos: tuple[int, ...]) -> Any:
    kept = _VOCABULARIES.get(model.tokenizer)
    if kept is None or kept[0] != eos:
        kept = (eos, vocabulary(model.tokenizer, model.config.vocab_size, eos))
        _VOCABULARIES[model.tokenizer] = kept
    return kept[1]


def _sampling(
    model: CoupledForCausalLM,
    rows: Sequence[Row],
    width: int,
    guidings: Sequence[Guiding | None],
) -> LogitsProcessorList:
    own = model.generation_config
    usual = (own.temperature or 1.0) if own.do_sample else 0.0
    each = [
        ([] if guiding is None else [Guided(guiding)])
        + row_processors(
            _first(row.params.temperature, usual),
            _first(row.params.top_p, own.top_p),
            _first(row.params.top_k, own.top_k),
            row.seed,
            width,
        )
        for row, guiding in zip(rows, guidings, strict=True)
    ]
    return LogitsProcessorList([RowSampling(each)] if any(each) else [])


def _first(asked: Any, default: Any) -> Any:
    return default if asked is None else asked


def _given(values: list[object]) -> list[object] | None:
    return None if all(value is None for value in values) else values
