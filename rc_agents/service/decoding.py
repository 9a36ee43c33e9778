"""What `generate` calls at every step for the rows of one batch: choose each row's token, read it, end the row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .. import context
from ..errors import InputError
from ..modeling import CoupledForCausalLM
from ..sampling import SeededSampling
from .going import Going


class RowSampling(LogitsProcessor):
    """Lets every row of a batch sample in its own way, under a greedy `generate`.

    Args:
        rows: what each row does to its scores, in order; nothing where the likeliest token is taken.
    """

    def __init__(self, rows: Sequence[Sequence[LogitsProcessor]]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T) tokens so far and (B, V) scores -> scores in which a sampled row has one token left."""
        chosen = []
        for row, processors in enumerate(self.rows):
            scores_1V = scores[row : row + 1]
            for process in processors:
                scores_1V = process(input_ids[row : row + 1], scores_1V)
            chosen.append(scores_1V)
        return torch.cat(chosen)


def row_processors(
    temperature: float, top_p: float | None, top_k: int | None, seed: int, prompt_length: int
) -> list[LogitsProcessor]:
    """Returns what one row does to its scores: temperature, the two cuts, the draw; nothing at temperature 0.

    Args:
        prompt_length: columns of the batch's prompts.
    """
    processors: list[LogitsProcessor] = []
    if temperature == 0:
        return processors
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(SeededSampling([seed], prompt_length))
    return processors


class Watch(StoppingCriteria):
    """Hands every new token to its row, and ends rows.

    Args:
        model: that generates.
        rows: of the batch; a row ends where its guide does, at its limit, its deadline, or where it is not wanted.
        width: columns that they have so far.
        pause: asked once a step while rows run, with the columns so far; True ends the call, not the rows.

    Attributes:
        paused: whether the call was ended for `pause`.
        full: the rows that have filled a model's context, for which the call ends.
    """

    def __init__(
        self,
        model: CoupledForCausalLM,
        rows: Sequence[Going],
        width: int,
        pause: Callable[[int], bool] | None = None,
    ) -> None:
        self._model = model
        self.rows, self._seen, self._pause = rows, width, pause
        self._open = list(rows)
        self.paused = False
        self.full: list[Going] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, T) tokens so far -> (B,) whether each row has ended."""
        columns = input_ids[:, self._seen :].T.tolist()
        self._seen = input_ids.shape[1]
        for column in columns:
            for row, token in zip(self.rows, column, strict=True):
                if not row.ended:
                    row.tokens.append(token)
                    self._give(row, row.reader.push(token))
                    self._follow(row, token)
        self._end_late_rows()
        self._end_full_rows()
        self.end_stopped()
        self._tell()
        done = [row.ended for row in self.rows]
        if self._pause is not None and not all(done) and self._pause(self._seen):
            self.paused, done = True, [True] * len(done)
        return torch.tensor(done, device=input_ids.device)

    def end_stopped(self) -> None:
        """Ends the rows that are not wanted any more."""
        for row in self.rows:
            if not row.ended and row.calls.stopped():
                self._give(row, row.reader.finish("cancelled"))

    def _follow(self, row: Going, token: int) -> None:
        if row.trace is not None:
            row.trace.push(token)
        if row.guiding is None or row.reader.finish_reason not in (None, "length"):
            return
        try:
            row.guiding.push(token)
        except InputError as error:  # this row's alone
            row.error = error
            self._give(row, row.reader.finish("error"))
            return
        if row.guiding.ended:
            self._give(row, row.reader.finish("stop"))
            row.reader.finish_reason = (
                "stop"  # whole, also where the last token was the last one allowed
            )

    def finish(self, reason: str) -> None:
        """Ends every row that runs."""
        for row in self.rows:
            self._give(row, row.reader.finish(reason))
        self._tell()

    def _end_late_rows(self) -> None:
        now = time.monotonic()
        for row in self.rows:
            if row.deadline is not None and now >= row.deadline:
                self._give(row, row.reader.finish("timeout"))

    def _end_full_rows(self) -> None:
        room = context.current(self._model)
        self.full = [self.rows[place] for place in sorted(room.full)] if room is not None else []
        for row in self.full:
            self._give(row, row.reader.finish("length"))

    def _tell(self) -> None:
        closed = [row for row in self._open if row.ended]
        self._open = [row for row in self._open if not row.ended]
        for row in closed:
            row.tell()

    def _give(self, row: Going, text: str) -> None:
        if text and row.calls.sink is not None:
            row.calls.sink(text)
