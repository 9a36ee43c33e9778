"""Rows of one `generate` call: what is decided for each before it, and the call itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from .. import context, selection
from ..errors import ContextError, InputError
from ..execution import LOST
from ..modeling import CoupledForCausalLM
from ..topology import ANCHOR
from .decoding import RowSampling, Sink, Watch, row_processors
from .guides import Guided, Guiding, Vocabulary
from .params import GenerationParams
from .prompts import Prompt
from .reading import RowReader
from .trace import Biased, TokenRecord, Trace, Traced, attributed, record

DEFAULT_MAX_NEW_TOKENS = 256
_VOCABULARIES: WeakKeyDictionary[Any, tuple[tuple[int, ...], Vocabulary]] = WeakKeyDictionary()
"""Tokenizers as guides read them, which takes a second to make."""
SCORED_TOGETHER = (
    256  # positions, so that a long prompt's probabilities never stand in memory at once
)
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


class Answer(NamedTuple):
    """A row that has ended, with what was kept of its tokens, and what went wrong with it alone."""

    reader: RowReader
    records: tuple[TokenRecord, ...]
    error: InputError | None = None
    lost: Mapping[str, str] = MappingProxyType({})


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


def groups(model: CoupledForCausalLM, rows: Sequence[Row]) -> list[list[Row]]:
    """Returns all rows as one group, or each alone where they do not fit the context side by side."""
    if not rows:
        return []
    named = [row.params.specialists for row in rows]
    everybody = any(names is None for names in named)
    present = None if everybody else {name for names in named for name in names or ()}
    shortest = context_limit(model, present)
    columns = max(row.size for row in rows) + max(row.limit for row in rows)
    if shortest is None or columns <= shortest[1]:
        return [list(rows)]
    return [[row] for row in rows]


def run(
    model: CoupledForCausalLM,
    rows: Sequence[Row],
    stopped: Callable[[int], bool],
    sink: Sink | None = None,
    ended: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Generates all rows in one call; returns their answers.

    Args:
        stopped: asked of each row before the call and at each step; True ends it.
        sink: takes a row's text as it settles.
        ended: takes a row's answer as soon as it has ended, while others may go on.
    """
    eos = _end_tokens(model)
    width = max(row.size for row in rows)
    readers = [_reader(model, row, eos) for row in rows]
    guidings = _guidings(model, rows, eos)
    traces = [_trace(row) for row in rows]
    timeouts = [row.params.timeout for row in rows]

    def answer(row: int) -> Answer:
        trace = traces[row]
        kept = () if trace is None else tuple(trace.records)
        return Answer(readers[row], kept, watch.errors.get(row), LOST.get())

    def tell(row: int) -> None:
        if ended is not None:
            ended(row, answer(row))

    LOST.set({})
    watch = Watch(readers, width, timeouts, stopped, sink, guidings, traces, tell)
    watch.end_stopped()
    if any(reader.finish_reason is None for reader in readers):
        ids, mask = _padded(model, rows, width)
        with attributed(model, traces, [row.params for row in rows]):
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                specialists=_given([row.params.specialists for row in rows]),
                strength=_given([row.params.strength for row in rows]),
                chats=_given([row.prompt.chat for row in rows]),
                logits_processor=_sampling(model, rows, width, guidings, traces),
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
    return [answer(row) for row in range(len(rows))]


@torch.inference_mode()
def score(model: CoupledForCausalLM, row: Row) -> tuple[TokenRecord, ...]:
    """Returns the records of a prompt's own tokens."""
    ids, mask = _padded(model, [row], row.size)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        specialists=_given([row.params.specialists]),
        strength=_given([row.params.strength]),
        chats=_given([row.prompt.chat]),
    )
    tokens, top = row.prompt.token_ids, row.params.logprobs or 0
    found = [TokenRecord(tokens[0])]
    for logits_TV in output.logits[0, :-1].split(SCORED_TOGETHER):
        wanted = tokens[len(found) : len(found) + len(logits_TV)]
        logprobs_TV = logits_TV.float().log_softmax(-1)
        found += [record(*pair, top) for pair in zip(wanted, logprobs_TV, strict=True)]
    return tuple(found)


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


def _vocabulary(model: CoupledForCausalLM, eos: tuple[int, ...]) -> Vocabulary:
    kept = _VOCABULARIES.get(model.tokenizer)
    if kept is None or kept[0] != eos:
        kept = (eos, Vocabulary(model.tokenizer, model.config.vocab_size, eos))
        _VOCABULARIES[model.tokenizer] = kept
    return kept[1]


def _sampling(
    model: CoupledForCausalLM,
    rows: Sequence[Row],
    width: int,
    guidings: Sequence[Guiding | None],
    traces: Sequence[Trace | None],
) -> LogitsProcessorList:
    own = model.generation_config
    usual = (own.temperature or 1.0) if own.do_sample else 0.0
    each = [
        _shaping(row, guiding, trace)
        + row_processors(
            _first(row.params.temperature, usual),
            _first(row.params.top_p, own.top_p),
            _first(row.params.top_k, own.top_k),
            row.seed,
            width,
        )
        for row, guiding, trace in zip(rows, guidings, traces, strict=True)
    ]
    return LogitsProcessorList([RowSampling(each)] if any(each) else [])


def _shaping(row: Row, guiding: Guiding | None, trace: Trace | None) -> list[LogitsProcessor]:
    """What one row does to its scores before it chooses."""
    found: list[LogitsProcessor] = [] if trace is None else [Traced(trace)]
    if row.params.logit_bias:
        found.append(Biased(row.params.logit_bias))
    return found if guiding is None else [*found, Guided(guiding)]


def _trace(row: Row) -> Trace | None:
    asked = row.params
    if asked.logprobs is None and not asked.attribution:
        return None
    return Trace(asked.logprobs, asked.attribution)


def _first(asked: Any, default: Any) -> Any:
    return default if asked is None else asked


def _given(values: Sequence[object]) -> list[object] | None:
    return None if all(value is None for value in values) else list(values)
