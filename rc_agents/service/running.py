"""The `generate` call that takes several rows further."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from ..cache import CoupledCache
from ..execution import LOST
from ..modeling import CoupledForCausalLM
from .decoding import RowSampling, Watch, row_processors
from .going import Answer, Calls, Going
from .guides import Guided, Guiding, Vocabulary
from .reading import RowReader
from .rows import Row
from .trace import Biased, TokenRecord, Trace, Traced, attributed, record

_VOCABULARIES: WeakKeyDictionary[Any, tuple[tuple[int, ...], Vocabulary]] = WeakKeyDictionary()
"""Tokenizers as guides read them, which takes a second to make."""
SCORED_TOGETHER = (
    256  # positions, so that a long prompt's probabilities never stand in memory at once
)
CONTEXT_TOKENS = 4  # of a plain text's end, enough to decode what follows as its continuation


def run(model: CoupledForCausalLM, rows: Sequence[Row], calls: Sequence[Calls]) -> list[Answer]:
    """Generates all rows in one call, each with its own callbacks; returns their answers."""
    LOST.set({})
    going = begin(model, rows, calls)
    left = going
    while left:  # once, but where a row has filled a model's context, which ends the call for all
        advance(model, left)
        left = [one for one in left if not one.ended]
    return [one.answer() for one in going]


def begin(model: CoupledForCausalLM, rows: Sequence[Row], calls: Sequence[Calls]) -> list[Going]:
    """Returns rows before their first token."""
    eos, now = _end_tokens(model), time.monotonic()
    return [
        Going(
            row=row,
            calls=own,
            reader=_reader(model, row, eos),
            tokens=list(row.prompt.token_ids),
            deadline=None if row.params.timeout is None else now + row.params.timeout,
            guiding=_guiding(model, row, eos),
            trace=_trace(row),
        )
        for row, own in zip(rows, calls, strict=True)
    ]


def advance(
    model: CoupledForCausalLM,
    rows: Sequence[Going],
    cache: CoupledCache | None = None,
    pause: Callable[[int], bool] | None = None,
) -> CoupledCache | None:
    """Generates until all rows have ended, or until a pause.

    Args:
        rows: that have not ended.
        cache: of the rows' tokens but the last; None where nothing was read yet.
        pause: asked once a step, with the columns so far; True returns with rows that may go on. None for never.

    Returns:
        The rows' cache, as `cache`, where some go on: they were paused, or another has filled a model's context. None
        where all have ended, and without `pause`: who goes on is read again.
    """
    width = max(len(one.tokens) for one in rows)
    watch = Watch(model, rows, width, pause)
    watch.end_stopped()
    if all(one.ended for one in rows):
        watch.finish("length")  # tells of those that were stopped
        return None
    ids, mask = _padded(model, [one.tokens for one in rows], width)
    eos = _end_tokens(model)
    past = {"sources": _shown(rows)} if cache is None else {"past_key_values": cache}
    with attributed(model, [one.trace for one in rows], [one.row.params for one in rows]):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            specialists=_given([one.row.params.specialists for one in rows]),
            strength=_given([one.row.params.strength for one in rows]),
            chats=_given([one.row.prompt.chat for one in rows]),
            logits_processor=_sampling(model, rows, width),
            stopping_criteria=StoppingCriteriaList([watch]),
            max_new_tokens=max(one.left for one in rows),
            eos_token_id=eos or None,
            pad_token_id=_padding(model),
            do_sample=False,  # a row that samples leaves one token to choose
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=True,
            max_length=None,
            stop_strings=None,
            **past,
        )
    if not watch.paused and not watch.full:
        watch.finish("length")
    if pause is None or all(one.ended for one in rows):
        return None
    found = output.past_key_values
    assert isinstance(found, CoupledCache)
    return found


@torch.inference_mode()
def score(model: CoupledForCausalLM, row: Row) -> tuple[TokenRecord, ...]:
    """Returns the records of a prompt's own tokens."""
    ids, mask = _padded(model, [row.prompt.token_ids], row.size)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        specialists=_given([row.params.specialists]),
        strength=_given([row.params.strength]),
        chats=_given([row.prompt.chat]),
        sources=row.prompt.sources,
    )
    tokens, top = row.prompt.token_ids, row.params.logprobs or 0
    found = [TokenRecord(tokens[0])]
    for logits_TV in output.logits[0, :-1].split(SCORED_TOGETHER):
        wanted = tokens[len(found) : len(found) + len(logits_TV)]
        logprobs_TV = logits_TV.float().log_softmax(-1)
        found += [record(*pair, top) for pair in zip(wanted, logprobs_TV, strict=True)]
    return tuple(found)


def _shown(rows: Sequence[Going]) -> dict[str, list[Any]]:
    """What each encoder is shown in every row."""
    each = [one.row.prompt.sources for one in rows]
    names = dict.fromkeys(name for sources in each for name in sources)
    return {name: [sources.get(name) for sources in each] for name in names}


def _reader(model: CoupledForCausalLM, row: Row, eos: Sequence[int]) -> RowReader:
    before = row.prompt.token_ids[-CONTEXT_TOKENS:] if row.prompt.continues else ()
    return RowReader(model.tokenizer, row.limit, eos, row.params.stop, before)


def _guiding(model: CoupledForCausalLM, row: Row, eos: Sequence[int]) -> Guiding | None:
    guide = row.params.guide
    return None if guide is None else Guiding(_vocabulary(model, tuple(eos)), guide)


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
    model: CoupledForCausalLM, tokens: Sequence[Sequence[int]], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    padding = _padding(model)
    ids = [[padding] * (width - len(row)) + list(row) for row in tokens]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in tokens]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def _vocabulary(model: CoupledForCausalLM, eos: tuple[int, ...]) -> Vocabulary:
    kept = _VOCABULARIES.get(model.tokenizer)
    if kept is None or kept[0] != eos:
        kept = (eos, Vocabulary(model.tokenizer, model.config.vocab_size, eos))
        _VOCABULARIES[model.tokenizer] = kept
    return kept[1]


def _sampling(model: CoupledForCausalLM, rows: Sequence[Going], width: int) -> LogitsProcessorList:
    own = model.generation_config
    usual = (own.temperature or 1.0) if own.do_sample else 0.0
    each = [
        _shaping(one)
        + row_processors(
            _first(one.row.params.temperature, usual),
            _first(one.row.params.top_p, own.top_p),
            _first(one.row.params.top_k, own.top_k),
            one.row.seed,
            width - one.reader.count,
        )
        for one in rows
    ]
    return LogitsProcessorList([RowSampling(each)] if any(each) else [])


def _shaping(one: Going) -> list[LogitsProcessor]:
    """What one row does to its scores before it chooses."""
    found: list[LogitsProcessor] = [] if one.trace is None else [Traced(one.trace)]
    if one.row.params.logit_bias:
        found.append(Biased(one.row.params.logit_bias))
    return found if one.guiding is None else [*found, Guided(one.guiding)]


def _trace(row: Row) -> Trace | None:
    asked = row.params
    if asked.logprobs is None and not asked.attribution:
        return None
    return Trace(asked.logprobs, asked.attribution)


def _first(asked: Any, default: Any) -> Any:
    return default if asked is None else asked


def _given(values: Sequence[object]) -> list[object] | None:
    return None if all(value is None for value in values) else list(values)
