"""Records to token ids, and where their loss counts."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from rc_agents.errors import DataError, nearest
from rc_agents.training.data.conversations import turns
from rc_agents.training.data.records import Conversation, Document, Pair, Record

TEXT_GROUP = "text"  # the group of documents

Long = Literal["refuse", "drop", "truncate"]
"""What happens to a pair that is too long."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of a record, from which token its loss counts (`answer_start`), and what encoders are shown."""

    ids: tuple[int, ...]
    answer_start: int
    group: str
    sources: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)


def encode(
    tokenizer: Any,
    records: Iterable[Record],
    *,
    max_length: int,
    block_length: int,
    answer_only: bool = True,
    long: Long = "refuse",
    every_turn: bool = False,
) -> list[Encoded]:
    """Returns token ids: a whole pair ends with the end-of-text token; documents, joined by it, fill blocks.

    Args:
        tokenizer: of the model that is trained.
        records: pairs, conversations and documents.
        max_length: the longest pair allowed, in tokens.
        block_length: tokens of a block of text; what is left after the last whole block is dropped.
        answer_only: count the loss of a pair on its completion alone.
        long: `refuse` a pair that is too long, `drop` it, or `truncate` it: its prompt loses its beginning,
            behind the begin-of-text token; a completion that is too long by itself loses its end. How many
            is a warning.
        every_turn: learn every assistant turn of a conversation, not the last alone; each turn is an
            example of its own.

    Raises:
        DataError: a pair is too long, none is left, or the documents together are shorter than one block.
    """
    if long not in get_args(Long):
        raise DataError(f"long={long!r} is unknown; {nearest(str(long), get_args(Long))}")
    records = list(records)
    pairs = _fit(list(_pairs(tokenizer, records, every_turn)), max_length, long, tokenizer)
    if not answer_only:
        pairs = [replace(pair, answer_start=1) for pair in pairs]
    return pairs + _blocks(tokenizer, records, block_length)


def _pairs(tokenizer: Any, records: Iterable[Record], every_turn: bool) -> Iterator[Encoded]:
    bos = tokenizer.bos_token
    for record in records:
        if isinstance(record, Conversation):
            for pair in turns(tokenizer, record, every=every_turn):
                yield _encode_pair(tokenizer, pair, rendered=True)
        elif isinstance(record, Pair):
            yield _encode_pair(
                tokenizer, record, rendered=bool(bos) and record.prompt.startswith(bos)
            )


def _blocks(tokenizer: Any, records: Iterable[Record], block_length: int) -> list[Encoded]:
    ids: list[int] = []
    for record in records:
        if isinstance(record, Document):
            ids += [*tokenizer(record.text, verbose=False).input_ids, tokenizer.eos_token_id]
    if ids and len(ids) < block_length:
        raise DataError(
            f"the text has {len(ids)} tokens, less than one block: lower block_length={block_length}"
        )
    starts = range(0, len(ids) - block_length + 1, block_length)
    return [Encoded(tuple(ids[start : start + block_length]), 1, TEXT_GROUP) for start in starts]


def _encode_pair(tokenizer: Any, pair: Pair, *, rendered: bool) -> Encoded:
    """Returns a pair's tokens; a chat template that rendered it has put the special ones where they belong."""
    if pair.group == TEXT_GROUP:
        raise DataError(
            f"the group name {TEXT_GROUP!r} belongs to documents; rename that of the pairs"
        )
    prompt = tokenizer(pair.prompt, add_special_tokens=not rendered, verbose=False).input_ids
    completion = tokenizer(pair.completion, add_special_tokens=False, verbose=False).input_ids
    ended = not pair.ends or completion[-1:] == [tokenizer.eos_token_id]
    end = [] if ended else [tokenizer.eos_token_id]
    return Encoded((*prompt, *completion, *end), len(prompt), pair.group, pair.sources)


def _fit(pairs: list[Encoded], max_length: int, long: Long, tokenizer: Any) -> list[Encoded]:
    """Returns pairs that are short enough."""
    too_long = [pair for pair in pairs if len(pair.ids) > max_length]
    if not too_long:
        return pairs
    what = f"{len(too_long)} of {len(pairs)} pairs have more than max_length={max_length} tokens"
    if long == "refuse":
        start = tokenizer.decode(too_long[0].ids[:40])[:60]
        raise DataError(
            f"{what}, the first {len(too_long[0].ids)}: {start!r}; "
            "raise max_length, or choose long='drop' or 'truncate'"
        )
    if long == "drop":
        kept = [pair for pair in pairs if len(pair.ids) <= max_length]
        if not kept:
            raise DataError(f"{what}: raise max_length, or choose long='truncate'")
    else:
        kept = [_truncated(pair, max_length, tokenizer.bos_token_id) for pair in pairs]
    warnings.warn(f"{what}: {'dropped' if long == 'drop' else 'truncated'}", stacklevel=3)
    return kept


def _truncated(pair: Encoded, max_length: int, bos: int | None) -> Encoded:
    prompt, answer = pair.ids[: pair.answer_start], pair.ids[pair.answer_start :]
    head = 1 if prompt[:1] == (bos,) else 0
    room = max(max_length - len(answer), 1)  # an answer is predicted from at least one token
    if room < len(prompt):
        prompt = prompt[:head] + prompt[len(prompt) - room + head :]
    return Encoded((*prompt, *answer)[:max_length], len(prompt), pair.group, pair.sources)
