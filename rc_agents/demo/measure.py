"""What the demo measures, for the frozen anchor, a frozen specialist and the ensemble alike.

A subject is a model with the names of the specialists that speak: `Subject(ensemble, None)` is everyone,
`Subject(ensemble, [])` the frozen anchor, `Subject(ensemble.models["medical"])` a frozen specialist by itself.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from rc_agents.demo import facts

NEW_TOKENS = 16


@dataclass(frozen=True)
class Subject:
    """Something that answers.

    Args:
        model: an ensemble or one of its frozen models.
        tokenizer: the anchor's.
        specialists: who speaks, for an ensemble; None for all.
    """

    model: Any
    tokenizer: Any
    specialists: Sequence[str] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What a call gets besides the tokens."""
        return {} if self.specialists is None else {"specialists": list(self.specialists)}

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Next-token logits, (B, T, V)."""
        return self.model(
            input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **self.options
        ).logits

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], new_tokens: int = NEW_TOKENS) -> list[str]:
        """Greedy answers to left-padded prompts."""
        batch = self.tokenizer(
            list(prompts), return_tensors="pt", padding=True, padding_side="left"
        )
        ids = self.model.generate(
            **batch,
            max_new_tokens=new_tokens,
            do_sample=False,
            stop_strings=["\n"],
            tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id,
            **self.options,
        )
        return self.tokenizer.batch_decode(
            ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )


@dataclass(frozen=True)
class Share:
    """So many of so many, with its 95 % Wilson interval."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end (Wilson, 1927)."""
        z, n, p = 1.96, self.count, self.value
        middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({self.hits}/{self.count}; 95 % {100 * low:.1f} to {100 * high:.1f})"


def exact_match(
    subject: Subject, chosen: Sequence[facts.Fact], *, batch: int = 55, label: str = ""
) -> Share:
    """Share of facts whose generated title is right, normalised."""
    hits = 0
    for part in _chunks(chosen, batch, label):
        answers = subject.answer([facts.qa_prompt(fact) for fact in part])
        hits += sum(facts.matches(answer, fact) for answer, fact in zip(answers, part, strict=True))
    return Share(hits, len(chosen))


def choice(
    subject: Subject,
    chosen: Sequence[facts.Fact],
    pool: Sequence[facts.Fact],
    *,
    seed: int,
    label: str = "",
) -> Share:
    """Share of facts whose own title has the highest mean log-probability a token among ten of the pool's titles."""
    hits = 0
    for (fact,) in _chunks(chosen, 1, label):
        titles = facts.choices(fact, pool, seed)
        scores = mean_logprobs(subject, facts.qa_prompt(fact), [f" {title}" for title in titles])
        hits += titles[max(range(len(titles)), key=scores.__getitem__)] == fact.title
    return Share(hits, len(chosen))


def mean_logprobs(subject: Subject, prompt: str, endings: Sequence[str]) -> list[float]:
    """Mean log-probability a token of each ending behind the prompt."""
    head = subject.tokenizer(prompt, return_tensors="pt").input_ids
    tails = [subject.tokenizer(end, add_special_tokens=False).input_ids for end in endings]
    width = max(map(len, tails))
    ids = torch.tensor([tail + [0] * (width - len(tail)) for tail in tails])
    with torch.inference_mode():
        first = subject.model(input_ids=head, use_cache=True, **subject.options)
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(tails))
        rest = subject.model(
            input_ids=ids, past_key_values=cache, use_cache=True, **subject.options
        )
    ahead = first.logits[:, -1:].expand(len(tails), -1, -1)
    logprobs = torch.cat([ahead, rest.logits[:, :-1]], dim=1).float().log_softmax(-1)
    return [float(logprobs[k, range(len(tail)), tail].mean()) for k, tail in enumerate(tails)]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss a token, with what it was measured on."""

    value: float
    documents: int
    tokens: int


def perplexity(
    subject: Subject, documents: Sequence[str], *, length: int = 128, label: str = ""
) -> Perplexity:
    """Perplexity over the first `length` tokens of each document."""
    total, count = 0.0, 0
    for (text,) in _chunks(documents, 1, label):
        ids = subject.tokenizer(
            text, return_tensors="pt", truncation=True, max_length=length
        ).input_ids
        if ids.shape[1] > 1:
            logits = subject.logits(ids, torch.ones_like(ids))[0, :-1].float()
            total += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return Perplexity(math.exp(total / count), len(documents), count)


def handoff(anchor: Subject, specialist: Subject, fact: facts.Fact) -> str:
    """Text between models: the specialist answers, the anchor reads its answer and answers."""
    told = specialist.answer([facts.qa_prompt(fact)])[0].strip()
    return anchor.answer(
        [f"Reference: ICD-10-CM code {fact.code} is {told}.\n{facts.qa_prompt(fact)}"]
    )[0]


def seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each call, interleaved, so that a slow moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def _chunks(items: Sequence[Any], size: int, label: str) -> Iterator[Sequence[Any]]:
    starts = range(0, len(items), size)
    for start in tqdm(starts, desc=label or None, disable=not label, leave=False):
        yield items[start : start + size]
