"""LangChain's chat models answer a batch by one thread an input; here these threads share one generation."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rc_agents import RCError
from rc_agents.service import GenerationParams, GenerationResult, GenerationService, Prompt

_BATCH: ContextVar[SharedBatch | None] = ContextVar("rc_agents_langchain_batch", default=None)


class SharedBatch:
    """The answers to one batch, generated in one call as soon as the first input asks for its own.

    Callbacks, caches and errors of each input stay LangChain's. An input that cannot run (too long, for example)
    makes each run alone, so that it alone fails.

    Args:
        prompts: of all inputs.

    Attributes:
        left: set where nobody waits any more.
    """

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts = list(prompts)
        self.left = threading.Event()
        self._lock = threading.Lock()
        self._params: GenerationParams | None = None
        self._answers: defaultdict[Prompt, list[GenerationResult]] = defaultdict(list)

    def take(
        self, service: GenerationService, prompt: Prompt, params: GenerationParams
    ) -> GenerationResult | None:
        """Returns an input's answer, or None where it has to run alone."""
        with self._lock:
            if self._params is None and prompt in self._prompts:
                self._params = params
                self._run(service, params)
            if params != self._params or not self._answers[prompt]:
                return None
            return self._answers[prompt].pop()

    def _run(self, service: GenerationService, params: GenerationParams) -> None:
        try:
            each = [params] * len(self._prompts)
            results = service.batch(self._prompts, each, cancel=self.left)
        except RCError:
            return
        for prompt, result in zip(self._prompts, results, strict=True):
            self._answers[prompt].append(result)


@contextmanager
def together(prompts: Iterable[Prompt]) -> Iterator[None]:
    """Lets the inputs that are answered inside the block share one generation."""
    batch = SharedBatch(prompts)
    token = _BATCH.set(batch)
    try:
        yield
    finally:
        batch.left.set()
        _BATCH.reset(token)


def answer(
    service: GenerationService,
    prompt: Prompt,
    params: GenerationParams,
    left: threading.Event | None = None,
) -> GenerationResult:
    """Answers a prompt, with its batch where it belongs to one; `left` ends one that runs alone."""
    batch = _BATCH.get()
    shared = batch.take(service, prompt, params) if batch is not None else None
    return shared or service.generate(prompt, params, cancel=left)
