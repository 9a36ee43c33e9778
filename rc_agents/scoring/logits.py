"""Scores from next-token logits: batches, padding, greedy decoding; where logits come from is the subclass's.

Shapes: B rows, T tokens of a row, V vocabulary, P positions kept, K continuations a prompt.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rc_agents.errors import InputError
from rc_agents.scoring.protocol import Cost, Likelihood, Loss

Rows = Sequence[Sequence[int]]


class LogitScorer(ABC):
    """Answers the `Scorer` protocol from logits.

    Prompts of like length share a batch, and every batch but a lonely one has several rows.

    Args:
        tokenizer: of the model whose vocabulary comes out.
        eos: tokens that end an answer, besides the tokenizer's own.
        batch_size: prompts a batch.
        text_batch_size: texts a batch in `nll`.
        device: where token ids go.
        trained_parameters: for the cost.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos: Iterable[int] = (),
        batch_size: int = 25,
        text_batch_size: int = 4,
        device: torch.device | str = "cpu",
        trained_parameters: int = 0,
    ) -> None:
        if tokenizer is None:
            raise InputError("a scorer reads text and needs a tokenizer")
        self.tokenizer = tokenizer
        self.eos = {*eos, tokenizer.eos_token_id} - {None}
        self.batch_size, self.text_batch_size = batch_size, text_batch_size
        self.device = torch.device(device)
        self._cost = Cost(trained_parameters=trained_parameters)

    @abstractmethod
    def forward(
        self,
        ids_BT: Tensor,
        mask_BM: Tensor,
        keep_BT: Tensor,
        cache: Any = None,
        *,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any]:
        """Returns logits (P, V) at the positions kept, row by row, and the filled cache.

        Args:
            ids_BT: new tokens.
            mask_BM: 1 for real tokens, those in the cache first.
            keep_BT: bool, the new positions whose logits are wanted.
            cache: what an earlier call returned, or None.
            use_cache: whether to fill one.
        """

    @property
    def cost(self) -> Cost:
        """What answering has cost so far."""
        return self._cost

    # The protocol.

    @torch.inference_mode()
    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Scores continuations behind prompts; a prompt with several is read once.

        Raises:
            InputError: a continuation without a token.
        """
        by_prompt: dict[str, list[int]] = {}
        for index, (prompt, _) in enumerate(pairs):
            by_prompt.setdefault(prompt, []).append(index)
        tails = [self.tokenizer(end, add_special_tokens=False).input_ids for _, end in pairs]
        if not all(tails):
            raise InputError(f"{pairs[tails.index([])]!r} has an empty continuation")
        found: list[Likelihood] = [Likelihood(0.0, True, 0)] * len(pairs)
        prompts = list(by_prompt)
        with self.cost.timed():
            heads = self._encode(prompts)
            for part in self._parts(heads, self.batch_size):
                members = [by_prompt[prompts[row]] for row in part]
                ends = [[tails[index] for index in group] for group in members]
                scored = self._behind([heads[row] for row in part], ends)
                for group, row in zip(members, scored, strict=True):
                    for index, one in zip(group, row, strict=True):
                        found[index] = one
        return found

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 16, *, first_line: bool = False
    ) -> list[str]:
        """Greedy answers, decoded without special tokens."""
        answers = [""] * len(prompts)
        with self.cost.timed():
            rows = self._encode(prompts)
            for part in self._parts(rows, self.batch_size):
                made = self._decode([rows[row] for row in part], max_new_tokens, first_line)
                self.cost.calls += len(part)
                self.cost.prompt_tokens += sum(len(rows[row]) for row in part)
                self.cost.completion_tokens += sum(map(len, made))
                for row, ids in zip(part, made, strict=True):
                    answers[row] = self._text(ids)
        return answers

    @torch.inference_mode()
    def next_logprobs(self, prompts: Sequence[str]) -> Tensor:
        """Log-probabilities of the token behind each prompt, (N, V)."""
        found: dict[int, Tensor] = {}
        with self.cost.timed():
            rows = self._encode(prompts)
            for part in self._parts(rows, self.batch_size):
                ids, mask = self._left_padded([rows[row] for row in part])
                logits_BV, _ = self.forward(ids, mask, _last(ids))
                found |= dict(zip(part, logits_BV.float().log_softmax(-1).cpu(), strict=True))
        return torch.stack([found[row] for row in range(len(prompts))])

    @torch.inference_mode()
    def nll(self, texts: Sequence[str], max_length: int = 128) -> list[tuple[float, int]]:
        """Summed loss and scored tokens of each text."""
        found: dict[int, tuple[float, int]] = {}
        with self.cost.timed():
            rows = [row[:max_length] for row in self._encode(texts)]
            for part in self._parts(rows, self.text_batch_size):
                losses = self._losses([rows[row] for row in part], [1] * len(part))
                found |= dict(zip(part, losses, strict=True))
        return [found[row] for row in range(len(texts))]

    @torch.inference_mode()
    def rolling_nll(self, texts: Sequence[str], window: int = 256, stride: int = 128) -> list[Loss]:
        """The loss of whole texts in a sliding window; every token but the first counts once.

        A token behind the first window is read with at least `window - stride` tokens before it (Press et al., 2021).
        No batch holds two windows of one text, so that a shuffled source is always another text's.

        Raises:
            InputError: a stride that skips tokens, or a text without a token.
        """
        if not 0 < stride < window:
            raise InputError(
                f"a window of {window} tokens moves by 1 to {window - 1}, not by {stride}"
            )
        sums, counts = [0.0] * len(texts), [0] * len(texts)
        with self.cost.timed():
            rows = self._encode(texts)
            parts = [
                (n, *one) for n, row in enumerate(rows) for one in _windows(row, window, stride)
            ]
            for chosen in _apart(parts, self.text_batch_size):
                batch = [parts[place] for place in chosen]
                losses = self._losses([ids for _, ids, _ in batch], [first for *_, first in batch])
                for (text, *_), (nll, count) in zip(batch, losses, strict=True):
                    sums[text] += nll
                    counts[text] += count
            heads = [self._first_bytes(text, row) for text, row in zip(texts, rows, strict=True)]
        sizes = [len(text.encode()) - head for text, head in zip(texts, heads, strict=True)]
        return [Loss(*one) for one in zip(sums, counts, sizes, strict=True)]

    # A batch.

    def _behind(self, heads: Rows, ends: Sequence[Rows]) -> list[list[Likelihood]]:
        """Scores each prompt's continuations: their first tokens by the prompt's pass, the others by one more."""
        ids, mask = self._left_padded(heads)
        longer = max(len(end) for row in ends for end in row) > 1
        first_BV, cache = self.forward(ids, mask, _last(ids), use_cache=longer)
        first_BV = first_BV.float().log_softmax(-1)
        taken = [[[_read(first_BV[b], end[0])] for end in row] for b, row in enumerate(ends)]
        if longer:
            each = max(map(len, ends))
            filled = [end for row in ends for end in (*row, *([row[0]] * (each - len(row))))]
            rest_RT, tail_mask = self._right_padded([end[:-1] for end in filled])
            order = torch.arange(len(heads), device=self.device).repeat_interleave(each)
            cache.batch_select_indices(order)
            whole = torch.cat([mask[order], tail_mask], dim=1)
            logits_PV, _ = self.forward(rest_RT, whole, tail_mask.bool(), cache, use_cache=True)
            logprobs = iter(logits_PV.float().log_softmax(-1))
            for place, end in enumerate(filled):
                reads = [_read(next(logprobs), token) for token in end[1:]]
                row, column = divmod(place, each)
                if column < len(ends[row]):
                    taken[row][column] += reads
        return [
            [Likelihood(sum(v for v, _ in one), all(g for _, g in one), len(one)) for one in row]
            for row in taken
        ]

    def _losses(self, rows: Rows, firsts: Sequence[int]) -> list[tuple[float, int]]:
        """Summed loss and number of each row's tokens from its `first` (at least 1) on."""
        ids, mask = self._right_padded(rows)
        keep = torch.zeros_like(mask, dtype=torch.bool)
        keep[:, :-1] = mask[:, 1:].bool()
        for row, first in enumerate(firsts):
            keep[row, : first - 1] = False
        logits_PV, _ = self.forward(ids, mask, keep)
        targets_P = ids[:, 1:][keep[:, :-1]]
        losses_P = torch.nn.functional.cross_entropy(
            logits_PV.float(), targets_P.to(logits_PV.device), reduction="none"
        )
        counts = keep.sum(1).tolist()
        sums = [float(one.double().sum()) for one in losses_P.cpu().split(counts)]
        return list(zip(sums, counts, strict=True))

    def _first_bytes(self, text: str, row: Sequence[int]) -> int:
        """Bytes that the first token spells, which nothing predicts; none where it is a special one."""
        if row[0] in self.tokenizer.all_special_ids:
            return 0
        head = self.tokenizer.decode(row[:1])
        return len(head.encode()) if text.startswith(head) else 1  # part of a character

    def _decode(self, rows: Rows, max_new_tokens: int, first_line: bool) -> list[list[int]]:
        ids, mask = self._left_padded(rows)
        made: list[list[int]] = [[] for _ in rows]
        open_rows = set(range(len(rows)))
        cache, begun = None, time.perf_counter()
        for step in range(max_new_tokens):
            logits_BV, cache = self.forward(ids, mask, _last(ids), cache, use_cache=True)
            if not step:
                self.cost.first_token_seconds += time.perf_counter() - begun
            ids = logits_BV.argmax(-1, keepdim=True).to(self.device)
            for row in sorted(open_rows):
                token = int(ids[row])
                if token in self.eos:
                    open_rows.discard(row)
                    continue
                made[row].append(token)
                if first_line and "\n" in self._text(made[row]).lstrip():
                    open_rows.discard(row)
            if not open_rows:
                break
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return made

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        rows = [list(self.tokenizer(text).input_ids) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise InputError(f"the text {text!r} has no token to read")
        return rows

    def _parts(self, rows: Rows, size: int) -> Iterator[list[int]]:
        """Yields the rows' places in batches of like size and length."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        count = -(-len(order) // size)
        starts = [len(order) * part // count for part in range(count + 1)] if count else [0]
        for start, end in itertools.pairwise(starts):
            yield order[start:end]

    def _left_padded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        return self._tensors([(width - len(row), row, 0) for row in rows])

    def _right_padded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        return self._tensors([(0, row, width - len(row)) for row in rows])

    def _tensors(self, rows: Sequence[tuple[int, Sequence[int], int]]) -> tuple[Tensor, Tensor]:
        pad = self.tokenizer.pad_token_id or 0
        ids = [[pad] * before + list(row) + [pad] * after for before, row, after in rows]
        mask = [[0] * before + [1] * len(row) + [0] * after for before, row, after in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)


def _windows(row: Sequence[int], window: int, stride: int) -> Iterator[tuple[Sequence[int], int]]:
    """Yields the windows of a text, and where in each the tokens begin that no window before it has scored."""
    end = min(window, len(row))
    yield row[:end], 1
    while end < len(row):
        done, end = end, min(end + stride, len(row))
        begin = max(0, end - window)
        yield row[begin:end], done - begin


def _apart(parts: Sequence[tuple[int, Sequence[int], int]], size: int) -> list[list[int]]:
    """Returns the windows' places in batches of about `size` and like length, each text at most once in a batch."""
    order = sorted(range(len(parts)), key=lambda place: (len(parts[place][1]), place))
    batches: list[list[int]] = []
    for place in order:
        for batch in batches:
            if len(batch) < size and all(parts[one][0] != parts[place][0] for one in batch):
                batch.append(place)
                break
        else:
            batches.append([place])
    for lonely in [batch for batch in batches if len(batch) == 1]:
        others = [batch for batch in batches if batch is not lonely]
        text = parts[lonely[0]][0]
        home = next((b for b in others if all(parts[one][0] != text for one in b)), None)
        if home is not None:
            home += lonely
            batches.remove(lonely)
    return batches


def _last(ids_BT: Tensor) -> Tensor:
    keep = torch.zeros_like(ids_BT, dtype=torch.bool)
    keep[:, -1] = True
    return keep


def _read(logprobs_V: Tensor, token: int) -> tuple[float, bool]:
    return float(logprobs_V[token]), int(logprobs_V.argmax()) == token
