"""Training data: records from files, splits that share no document, batches that waste no padding.

Shapes: B rows, T tokens of a row, P positions with a label.
"""

import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rc_agents.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
TEXT_GROUP = "text"
_PAIR_KEYS = (("prompt", "completion"), ("question", "answer"))


@dataclass(frozen=True)
class Document:
    """A text to be learnt as it is."""

    text: str

    @property
    def key(self) -> str:
        return self.text


@dataclass(frozen=True)
class Pair:
    """A prompt and what should follow it; batches are made of pairs of one `group`, such as one prompt template.

    The group's name is free, but `text` is the group of documents.
    """

    prompt: str
    completion: str
    group: str = ""

    @property
    def key(self) -> str:
        return self.prompt


Record = Document | Pair
Batch = dict[str, Tensor]


# --- reading ----------------------------------------------------------------------------------------------------


def read(source: str | Path | Iterable[Record | Mapping[str, Any]]) -> list[Record]:
    """Records of a JSONL file, a text or Python file, a folder of those, or of objects at hand.

    A JSON line is `{"text": ...}`, `{"prompt": ..., "completion": ...}` or `{"question": ..., "answer": ...}`; a pair
    may name its `"group"`. A text file is one document.

    Raises:
        DataError: nothing there, nothing readable in it, or a malformed line, which is named.
    """
    if not isinstance(source, str | Path):
        records = [_record(item, f"record {number}") for number, item in enumerate(source, start=1)]
    else:
        records = _read_path(Path(source).expanduser())
    if not records:
        raise DataError(f"No training data in {source if isinstance(source, str | Path) else 'the records given'}.")
    return records


def _read_path(path: Path) -> list[Record]:
    if not path.exists():
        raise DataError(f"Training data {path} does not exist.")
    if path.is_file():
        return _read_file(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in (*TEXT_SUFFIXES, ".jsonl") and file.is_file())
    if not files:
        raise DataError(f"Folder {path} has no {', '.join(TEXT_SUFFIXES)} or .jsonl file to train on.")
    return [record for file in files for record in _read_file(file)]


def _read_file(path: Path) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Training data {path} cannot be read as UTF-8 text: {error}.") from error
    if path.suffix != ".jsonl":
        return [Document(text)] if text.strip() else []
    lines = ((number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip())
    return [_record(_parse(line, f"{path}:{number}"), f"{path}:{number}") for number, line in lines]


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}.") from error


def _record(item: Any, where: str) -> Record:
    if isinstance(item, Document | Pair):
        return item
    if isinstance(item, str):
        item = {"text": item}
    if isinstance(item, Mapping):
        if _filled(item, "text"):
            return Document(item["text"])
        for prompt, completion in _PAIR_KEYS:
            if _filled(item, prompt, completion):
                return Pair(item[prompt], item[completion], str(item.get("group", "")))
    found = f"keys {sorted(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
    raise DataError(f"{where} needs a non-empty text, prompt and completion, or question and answer; it has {found}.")


def _filled(item: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(item.get(key), str) and item[key].strip() for key in keys)


# --- splitting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Split:
    """Records by use; equal texts, or equal prompts, always fall into the same part."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]


def split(records: Iterable[Record], *, validation: float = 0.05, test: float = 0.05, seed: int = 0) -> Split:
    """Split by the hash of each document or prompt, so that a record's part depends on nothing but itself."""
    parts = Split(train=[], validation=[], test=[])
    for record in records:
        position = _position(record.key, seed)
        part = parts.test if position < test else parts.validation if position < test + validation else parts.train
        part.append(record)
    return parts


def _position(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{' '.join(key.split())}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# --- tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Token ids of a record and where its loss counts: from token `answer_start` on."""

    ids: tuple[int, ...]
    answer_start: int
    group: str


def encode(
    tokenizer: Any, records: Iterable[Record], *, max_length: int, block_length: int, answer_only: bool = True
) -> list[Encoded]:
    """Tokenize: pairs end with the end-of-text token; documents are joined by it and cut into full blocks.

    Raises:
        DataError: a pair is longer than `max_length`, or the documents together are shorter than one block.
    """
    encoded: list[Encoded] = []
    documents: list[int] = []
    for record in records:
        if isinstance(record, Pair):
            encoded.append(_encode_pair(tokenizer, record, max_length, answer_only))
        else:
            documents += [*tokenizer(record.text, verbose=False).input_ids, tokenizer.eos_token_id]
    if documents and len(documents) < block_length:
        raise DataError(f"The training text has {len(documents)} tokens, less than one block of {block_length}.")
    starts = range(0, len(documents) - block_length + 1, block_length)
    return encoded + [Encoded(tuple(documents[start : start + block_length]), 1, TEXT_GROUP) for start in starts]


def _encode_pair(tokenizer: Any, pair: Pair, max_length: int, answer_only: bool) -> Encoded:
    rendered = bool(tokenizer.bos_token) and pair.prompt.startswith(tokenizer.bos_token)  # by a chat template
    prompt = tokenizer(pair.prompt, add_special_tokens=not rendered).input_ids
    completion = tokenizer(pair.completion, add_special_tokens=False).input_ids
    ids = (*prompt, *completion, tokenizer.eos_token_id)
    if len(ids) > max_length:
        raise DataError(f"A pair has {len(ids)} tokens, more than max_length={max_length}: {pair.prompt[:60]!r}.")
    return Encoded(ids, len(prompt) if answer_only else 1, pair.group)


# --- batches ----------------------------------------------------------------------------------------------------


def plan(
    examples: Sequence[Encoded],
    *,
    batch_size: int,
    text_batch_size: int,
    steps: int,
    seed: int,
    mix: Mapping[str, float] | None = None,
) -> list[list[int]]:
    """Which examples each step sees: every batch of one group, each group running through its own shuffled epochs.

    Args:
        batch_size: pairs a step.
        text_batch_size: text blocks a step.
        mix: share of the steps by group; by default each group gets the share its batches have in one epoch.

    Raises:
        DataError: `mix` names other groups than the data has.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.group].append(index)
    sizes = {name: text_batch_size if name == TEXT_GROUP else batch_size for name in groups}
    shares = mix or {name: math.ceil(len(members) / sizes[name]) for name, members in groups.items()}
    if set(shares) != set(groups):
        raise DataError(f"mix names the groups {sorted(shares)}, but the data has {sorted(groups)}.")
    rng = random.Random(seed)
    streams = {name: _stream(members, sizes[name], rng) for name, members in sorted(groups.items())}
    chosen = rng.choices(sorted(shares), [shares[name] for name in sorted(shares)], k=steps)
    return [next(streams[name]) for name in chosen]


def _stream(members: Sequence[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless batches: shuffled epochs one after another, the rest of an epoch too short for a batch left out."""
    while True:
        order = rng.sample(members, len(members))
        for start in range(0, max(len(order) - size, 0) + 1, size):
            yield order[start : start + size]


class Batches(torch.utils.data.Dataset[Batch]):
    """The batches of a plan in order, one a step, collated when asked for."""

    def __init__(self, examples: Sequence[Encoded], steps: Sequence[Sequence[int]]) -> None:
        self.examples, self.steps = examples, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> Batch:
        return collate([self.examples[index] for index in self.steps[step]])


def collate(examples: Sequence[Encoded]) -> Batch:
    """One batch: text blocks as equal rows, pairs packed into one row behind the prefix they share."""
    if all(example.group == TEXT_GROUP for example in examples):
        ids_BT = torch.tensor([example.ids for example in examples])
        return {"input_ids": ids_BT, "labels": ids_BT.clone()}
    return pack(examples)


def pack(examples: Sequence[Encoded]) -> Batch:
    """Lay pairs one after another in a single row, their common prefix once, each blind to the others.

    Gives every labelled position the logits it has when its pair runs alone, at a fraction of the tokens: no padding,
    and a prompt template is computed once a batch.

    Returns:
        `input_ids` and `position_ids` (1, T), `attention_mask` (1, 1, T, T) additive, and for the P positions with a
        label: `label_positions` (P) and `targets` (P), the token that comes next there.
    """
    shared = _shared_prefix(examples)
    ids, positions, owners = list(examples[0].ids[:shared]), list(range(shared)), [-1] * shared
    label_positions, targets = [], []
    for owner, example in enumerate(examples):
        offset = len(ids) - shared
        ids += example.ids[shared:-1]
        positions += range(shared, len(example.ids) - 1)
        owners += [owner] * (len(example.ids) - 1 - shared)
        for index in range(example.answer_start, len(example.ids)):
            label_positions.append(index - 1 if index - 1 < shared else offset + index - 1)
            targets.append(example.ids[index])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": _blind_mask(torch.tensor(owners)),
        "label_positions": torch.tensor(label_positions),
        "targets": torch.tensor(targets),
    }


def _shared_prefix(examples: Sequence[Encoded]) -> int:
    """Tokens that all examples start with, short of any example's last."""
    columns: Iterator[tuple[int, ...]] = zip(*(example.ids[:-1] for example in examples), strict=False)
    count = 0
    for column in columns:
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _blind_mask(owner_T: Tensor) -> Tensor:
    """Additive causal mask (1, 1, T, T): a token sees the shared prefix (owner -1) and its own pair."""
    same_TT = (owner_T[:, None] == owner_T[None, :]) | (owner_T[None, :] == -1)
    mask_TT = torch.zeros(same_TT.shape).masked_fill(~same_TT.tril(), torch.finfo(torch.float32).min)
    return mask_TT[None, None]
