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

from ..errors import InputError
from ..sampling import SeededSampling
from .guides import Guiding
from .reading import RowReader
from .trace import Trace

Sink = Callable[[int, str], None]
"""Takes a row's number and the text that has settled there."""


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
    """Hands every new token to its row's reader, and ends rows.

    Args:
        readers: one a row.
        width: columns of the prompts.
        guidings: one a row, None where it is free; a row ends where its guide does.
        timeouts: seconds a row may take from now, None for no limit.
        stopped: asked of every row that runs, once a step; True ends it as cancelled.
        sink: takes settled text.
        traces: one a row, None where nothing is kept.
        ended: told of each row when it has ended.
    """

    def __init__(
        self,
        readers: Sequence[RowReader],
        width: int,
        timeouts: Sequence[float | None],
        stopped: Callable[[int], bool],
        sink: Sink | None = None,
        guidings: Sequence[Guiding | None] = (),
        traces: Sequence[Trace | None] = (),
        ended: Callable[[int], None] | None = None,
    ) -> None:
        self._ended, self._open = ended, set(range(len(readers)))
        self.errors: dict[int, InputError] = {}
        self._traces = traces or [None] * len(readers)
        self._guidings = guidings or [None] * len(readers)
        self.readers, self._seen, self._stopped, self._sink = readers, width, stopped, sink
        now = time.monotonic()
        self._deadlines = [None if seconds is None else now + seconds for seconds in timeouts]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, T) tokens so far -> (B,) whether each row has ended."""
        columns = input_ids[:, self._seen :].T.tolist()
        self._seen = input_ids.shape[1]
        for column in columns:
            for row, reader in enumerate(self.readers):
                if reader.finish_reason is None:
                    self._give(row, reader.push(column[row]))
                    self._follow(row, column[row])
        self._end_late_rows()
        self.end_stopped()
        self._tell()
        done = [reader.finish_reason is not None for reader in self.readers]
        return torch.tensor(done, device=input_ids.device)

    def end_stopped(self) -> None:
        """Ends the rows that are not wanted any more."""
        for row, reader in enumerate(self.readers):
            if reader.finish_reason is None and self._stopped(row):
                self._give(row, reader.finish("cancelled"))

    def _follow(self, row: int, token: int) -> None:
        trace = self._traces[row]
        if trace is not None:
            trace.push(token)
        guiding, reader = self._guidings[row], self.readers[row]
        if guiding is None or reader.finish_reason not in (None, "length"):
            return
        try:
            guiding.push(token)
        except InputError as error:  # this row's alone
            self.errors[row] = error
            self._give(row, reader.finish("error"))
            return
        if guiding.ended:
            self._give(row, reader.finish("stop"))
            reader.finish_reason = (
                "stop"  # whole, also where the last token was the last one allowed
            )

    def finish(self, reason: str) -> None:
        """Ends every row that runs."""
        for row, reader in enumerate(self.readers):
            self._give(row, reader.finish(reason))
        self._tell()

    def _end_late_rows(self) -> None:
        now = time.monotonic()
        for row, deadline in enumerate(self._deadlines):
            if deadline is not None and now >= deadline:
                self._give(row, self.readers[row].finish("timeout"))

    def _tell(self) -> None:
        closed = [row for row in self._open if self.readers[row].finish_reason is not None]
        for row in sorted(closed):
            self._open.discard(row)
            if self._ended is not None:
                self._ended(row)

    def _give(self, row: int, text: str) -> None:
        if text and self._sink is not None:
            self._sink(row, text)
