"""Records to token ids, and where their loss counts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rc_agents.errors import DataError
from rc_agents.training.data.records import Pair, Record

TEXT_GROUP = "text"  # the group of documents


@dataclass(frozen=True)
class Encoded:
    """Token ids of a record and where its loss counts: from token `answer_start` on."""

    ids: tuple[int, ...]
    answer_start: int
    group: str


def encode(
    tokenizer: Any,
    records: Iterable[Record],
    *,
    max_length: int,
    block_length: int,
    answer_only: bool = True,
) -> list[Encoded]:
    """Returns token ids: a pair ends with the end-of-text token; documents, joined by it, fill blocks.

    Args:
        tokenizer: of the model that is trained.
        records: pairs and documents.
        max_length: the longest pair allowed, in tokens.
        block_length: tokens of a block of text; what is left after the last whole block is dropped.
        answer_only: count the loss of a pair on its completion alone.

    Raises:
        DataError: a pair is too long, or the documents together are shorter than one block.
    """
    encoded: list[Encoded] = []
    documents: list[int] = []
    for record in records:
        if isinstance(record, Pair):
            encoded.append(_encode_pair(tokenizer, record, max_length, answer_only))
        else:
            documents += [*tokenizer(record.text, verbose=False).input_ids, tokenizer.eos_token_id]
    if documents and len(documents) < block_length:
        raise DataError(
            f"the text has {len(documents)} tokens, less than one block: lower block_length={block_length}"
        )
    starts = range(0, len(documents) - block_length + 1, block_length)
    return encoded + [
        Encoded(tuple(documents[start : start + block_length]), 1, TEXT_GROUP) for start in starts
    ]


def _encode_pair(tokenizer: Any, pair: Pair, max_length: int, answer_only: bool) -> Encoded:
    if pair.group == TEXT_GROUP:
        raise DataError(
            f"the group name {TEXT_GROUP!r} belongs to documents; rename that of the pairs"
        )
    bos = tokenizer.bos_token
    rendered = bool(bos) and pair.prompt.startswith(bos)  # by a chat template, which put it there
    prompt = tokenizer(pair.prompt, add_special_tokens=not rendered).input_ids
    completion = tokenizer(pair.completion, add_special_tokens=False).input_ids
    ids = (*prompt, *completion, tokenizer.eos_token_id)
    if len(ids) > max_length:
        raise DataError(
            f"a pair has {len(ids)} tokens, more than max_length={max_length}: {pair.prompt[:60]!r}"
        )
    return Encoded(ids, len(prompt) if answer_only else 1, pair.group)
