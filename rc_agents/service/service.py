"""The service itself: prompts in, texts out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..modeling import CoupledForCausalLM
from . import joining as _joining
from . import rows as _rows
from . import running as _running
from .going import Answer, Calls, Going
from .loading import load
from .params import GenerationParams
from .prompting import Prompting
from .prompts import Prompt, PromptLike
from .requests import GenerationResult, Request, entered, result
from .rows import Row
from .stream import TextStream
from .trace import TokenRecord

Sink = Callable[[int, str], None]
"""Takes a row's number and the text that has settled there."""


class GenerationService(Prompting):
    """Generates text with an ensemble; one path for single calls, batches and streams, safe from several threads.

    Args:
        model: the ensemble; its anchor needs a tokenizer.
        processors: encoder -> its image processor or feature extractor, where none lies beside the encoder.

    Raises:
        InputError: no ensemble, no tokenizer, or a processor for what is no encoder.
    """

    @classmethod
    def of(
        cls,
        model: CoupledForCausalLM | GenerationService | str | Path,
        *,
        processors: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> GenerationService:
        """Returns a service over a live ensemble, or over one that is loaded by its name.

        Args:
            model: the ensemble, or what `load` takes; a service is returned as it is.
            processors: as for the service.
            options: for `load`.

        Raises:
            InputError: as for the service, or processors or options for what is made or loaded already.
            RCError: an ensemble that cannot be loaded.
        """
        if isinstance(model, (str, Path)):
            return cls(load(model, **options), processors)
        if options:
            raise InputError(
                f"{next(iter(options))!r} is for loading, and this model is loaded already; leave it out"
            )
        if not isinstance(model, GenerationService):
            return cls(model, processors)
        if processors is not None:
            raise InputError("processors come with a service; give them to GenerationService")
        return model

    def generate(
        self,
        prompt: PromptLike,
        params: GenerationParams | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> GenerationResult:
        """Answers one prompt; arguments and errors as in `batch`."""
        return self.batch([prompt], params, cancel=cancel)[0]

    def batch(
        self,
        prompts: Sequence[PromptLike],
        params: GenerationParams | Sequence[GenerationParams] | None = None,
        *,
        cancel: threading.Event | Sequence[threading.Event] | None = None,
        sink: Sink | None = None,
        ended: Callable[[int, GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        """Answers several prompts in one left-padded `generate` call, each as it would be answered alone.

        Prompts that do not fit the context side by side (the longest prompt and the longest answer together) are
        answered one after another.

        Args:
            prompts: texts, chats or rendered prompts, mixed freely.
            params: for all rows, or one a row.
            cancel: once set, every row ends within one token with finish_reason "cancelled"; or one event a row.
            sink: takes a row's number and its text as it comes.
            ended: takes a row's number and its result as soon as it has ended, while others may go on.

        Raises:
            InputError: an empty prompt, one that is too long, an unknown specialist; nothing has run then.
        """
        rows = self._plan(prompts, params)
        stopped = _asks(cancel)
        results: list[GenerationResult] = []
        for group in _rows.groups(self.model, rows):
            first = len(results)
            moved = partial(_shifted, stopped, first)
            results += self._run(group, moved, _moved(sink, first), _moved(ended, first))
        return results

    def continuous(self, joins: Callable[[int], Sequence[Request]]) -> None:
        """Answers requests side by side, of which each may come at any token (continuous batching).

        What runs is paused while the prompts of those that join are read. Every request has to fit the context alone,
        and none waits for others but where a model that it does not ask for has no room for it. What is wrong with
        one ends it alone, with its `error`: where a pass fails, its rows are read again, and go on without the one at
        fault, or each by itself where none is. Returns when none runs and none comes; nothing is kept of those that
        have ended.

        Args:
            joins: asked at first and once a token, with the number of rows that run, for requests that join them.

        Raises:
            InputError: `joining_refusal` says why rows cannot join. What `joins` or a callback raises, with the others
                left unfinished, is raised as it is.
        """
        if (why := self.joining_refusal()) is not None:
            raise InputError(f"rows cannot join others that are being answered: {why}; use batch")

        raised: list[Exception] = []

        def plan(one: Request) -> Row:
            return self._plan([one.prompt], [one.params])[0]

        def more(running: int) -> list[Going]:
            if raised:
                raise raised[0]
            found = [entered(self.model, one, plan, raised) for one in joins(running)]
            return [one for one in found if one is not None]

        _joining.run(self.model, more)
        if raised:
            raise raised[0]

    def joining_refusal(self) -> str | None:
        """Returns why rows cannot join others that are being answered; None where they can.

        They can where every model runs in this process and keeps each row's past apart: full and sliding-window
        attention, convolutions and state spaces.
        """
        return _joining.refusal(self.model)

    def fits_beside(
        self,
        others: Sequence[tuple[Prompt, GenerationParams]],
        one: tuple[Prompt, GenerationParams],
        *,
        continuous: bool = False,
    ) -> bool:
        """Whether a prompt and its answer fit the context beside others in one `generate` call.

        Args:
            others: prompts with their parameters.
            one: a prompt with its own.
            continuous: whether each begins and ends at its own token, as in `continuous`.

        Raises:
            InputError: the one cannot be answered at all.
        """
        row = _rows.plan_row(self.model, *one, 0)
        beside = [_rows.plan_row(self.model, *other, 0) for other in others]
        if continuous:
            return _rows.fit_together(self.model, [*beside, row])
        return len(_rows.groups(self.model, [*beside, row])) == 1

    def score(
        self, prompt: PromptLike, params: GenerationParams | None = None
    ) -> tuple[TokenRecord, ...]:
        """Returns how likely each token of a prompt is behind those before it; the first has no probability.

        Args:
            prompt: a text, a chat or a rendered prompt.
            params: `logprobs`, `specialists` and `strength` count.

        Raises:
            InputError: as in `batch`.
        """
        (row,) = self._plan([prompt], params)
        return _running.score(self.model, row)

    def stream(
        self,
        prompt: PromptLike,
        params: GenerationParams | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> TextStream[GenerationResult]:
        """Answers one prompt as an iterator of text; its `result` holds the whole once it has ended.

        Args:
            prompt: a text, a chat or a rendered prompt.
            params: how to generate.
            cancel: once set, the stream ends within one token.

        Raises:
            InputError: as in `batch`, before anything runs.
        """
        rows = self._plan([prompt], params)
        cancelled = _asks(cancel)

        def run(put: Callable[[str], None], closed: Callable[[], bool]) -> GenerationResult:
            stopped = lambda row: closed() or cancelled(row)  # noqa: E731
            return self._run(rows, stopped, lambda row, text: put(text))[0]

        return TextStream(run)

    def _plan(self, prompts: Any, params: Any) -> list[Row]:
        if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
            raise InputError(f"a batch is a list of prompts, got {type(prompts).__name__}")
        if params is None or isinstance(params, GenerationParams):
            each = [(params or GenerationParams(), number) for number in range(len(prompts))]
        else:
            each = [(one, 0) for one in params]
        if len(each) != len(prompts):
            raise InputError(f"params has {len(each)} entries for {len(prompts)} prompts")
        pairs = zip(prompts, each, strict=True)
        return [
            _rows.plan_row(self.model, self.prompt(prompt), *chosen) for prompt, chosen in pairs
        ]

    def _run(
        self,
        rows: list[Row],
        stopped: Callable[[int], bool],
        sink: Sink | None = None,
        ended: Callable[[int, GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        calls = [
            Calls(
                stopped=partial(stopped, number),
                sink=None if sink is None else partial(sink, number),
                ended=None if ended is None else partial(_tell, partial(ended, number), row),
            )
            for number, row in enumerate(rows)
        ]
        answers = _running.run(self.model, rows, calls)
        wrong = [answer.error for answer in answers if answer.error is not None]
        if wrong and ended is None:
            raise wrong[0]
        return [result(row, answer) for row, answer in zip(rows, answers, strict=True)]


def _tell(ended: Callable[[GenerationResult], None], row: Row, answer: Answer) -> None:
    ended(result(row, answer))


def _asks(
    cancel: threading.Event | Sequence[threading.Event] | None,
) -> Callable[[int], bool]:
    """Whether a row of the batch is not wanted any more."""
    if cancel is None:
        return lambda row: False
    if isinstance(cancel, threading.Event):
        return lambda row: cancel.is_set()
    return lambda row: cancel[row].is_set()


def _shifted(stopped: Callable[[int], bool], first: int, row: int) -> bool:
    return stopped(first + row)


def _moved(
    call: Callable[[int, Any], None] | None, first: int
) -> Callable[[int, Any], None] | None:
    """A callback that counts rows from the batch's first one, not from the group's."""
    return None if call is None else lambda row, value: call(first + row, value)
