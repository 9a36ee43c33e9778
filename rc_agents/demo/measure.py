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
from transformers import StoppingCriteria

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
    def run(self, ids_BT: Tensor, mask_BT: Tensor, cache: Any = None) -> Any:
        """One forward pass of padded rows, behind a cache where one is given; fills a cache."""
        width = ids_BT.shape[1]
        places = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        return self.model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            **self.options,
        )

    def answer(self, prompts: Sequence[str], titles: Sequence[str] = ()) -> list[str]:
        """Greedy answers to left-padded prompts, up to the end of their first line that is not empty.

        With `titles`, one a prompt, an answer also ends where it can no longer become its title.
        """
        batch = self.tokenizer(
            list(prompts), return_tensors="pt", padding=True, padding_side="left"
        )
        ids = self.model.generate(**batch, **self._begun(batch), **self.settings(batch, titles))
        return self.tokenizer.batch_decode(
            ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def settings(self, batch: Any, titles: Sequence[str] = ()) -> dict[str, Any]:
        """What `generate` gets besides the tokens."""
        return {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "stopping_criteria": [FirstLine(self.tokenizer, batch["input_ids"].shape[1], titles)],
            "pad_token_id": self.tokenizer.pad_token_id,
            **self.options,
        }

    def _begun(self, batch: Any) -> dict[str, Any]:
        """A cache of what all prompts start with, computed once; nothing where they share little."""
        ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
        same = int((ids_BT == ids_BT[:1]).all(0).long().cumprod(0).sum())
        shared = min(same, ids_BT.shape[1] - 1)
        if len(ids_BT) < 2 or shared < 8 or not mask_BT.all():
            return {}
        cache = self.run(ids_BT[:1, :shared], mask_BT[:1, :shared]).past_key_values
        cache.batch_repeat_interleave(len(ids_BT))
        return {"past_key_values": cache}


class FirstLine(StoppingCriteria):
    """Ends a row once it has written a line that is not empty, or can no longer become its title.

    Args:
        tokenizer: the anchor's.
        start: where the new tokens begin.
        titles: what each row is compared with; none to let every row write its line.
    """

    def __init__(self, tokenizer: Any, start: int, titles: Sequence[str] = ()) -> None:
        self.tokenizer, self.start = tokenizer, start
        self.titles = [facts.normalise(title) for title in titles]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, T) tokens -> (B,), whether each row is done."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = ["\n" in text.lstrip() for text in texts]
        for row, title in enumerate(self.titles):
            so_far = facts.normalise(texts[row].rstrip("\ufffd"))  # a character may be half written
            done[row] |= not title.startswith(so_far)
        return torch.tensor(done, device=input_ids.device)


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
    """Share of facts whose generated title is right, normalised.

    Facts with titles of like length share a batch, and an answer that is wrong already is not written to its end:
    that saves time and changes no count.
    """
    hits = 0
    for part in _chunks(sorted(chosen, key=lambda fact: len(fact.title)), batch, label):
        answers = subject.answer(
            [facts.qa_prompt(fact) for fact in part], [fact.title for fact in part]
        )
        hits += sum(facts.matches(answer, fact) for answer, fact in zip(answers, part, strict=True))
    return Share(hits, len(chosen))


def choice(
    subject: Subject,
    chosen: Sequence[facts.Fact],
    pool: Sequence[facts.Fact],
    *,
    seed: int,
    batch: int = 5,
    label: str = "",
) -> Share:
    """Share of facts whose own title has the highest mean log-probability a token among ten of the pool's titles."""
    hits = 0
    for part in _chunks(chosen, batch, label):
        titles = [facts.choices(fact, pool, seed) for fact in part]
        scores = mean_logprobs(
            subject,
            [facts.qa_prompt(fact) for fact in part],
            [[f" {title}" for title in one] for one in titles],
        )
        for fact, names, row in zip(part, titles, scores, strict=True):
            hits += names[max(range(len(names)), key=row.__getitem__)] == fact.title
    return Share(hits, len(chosen))


@torch.inference_mode()
def mean_logprobs(
    subject: Subject, prompts: Sequence[str], endings: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Mean log-probability a token of each ending behind its prompt; as many endings for every prompt."""
    heads = subject.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    tails = [
        subject.tokenizer(end, add_special_tokens=False).input_ids for row in endings for end in row
    ]
    each, width = len(endings[0]), max(map(len, tails))
    ids_RW = torch.tensor([tail + [0] * (width - len(tail)) for tail in tails])
    mask_RT = torch.cat(
        [heads["attention_mask"].repeat_interleave(each, 0), torch.ones_like(ids_RW)], dim=1
    )
    first = subject.run(heads["input_ids"], heads["attention_mask"])
    cache = first.past_key_values
    cache.batch_repeat_interleave(each)
    rest = subject.run(ids_RW, mask_RT, cache)
    ahead = first.logits[:, -1:].repeat_interleave(each, 0)
    logprobs = torch.cat([ahead, rest.logits[:, :-1]], dim=1).float().log_softmax(-1)
    scores = [float(logprobs[k, range(len(tail)), tail].mean()) for k, tail in enumerate(tails)]
    return [scores[start : start + each] for start in range(0, len(scores), each)]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss a token, with what it was measured on."""

    value: float
    documents: int
    tokens: int


@torch.inference_mode()
def perplexity(
    subject: Subject,
    documents: Sequence[str],
    *,
    length: int = 128,
    batch: int = 4,
    label: str = "",
) -> Perplexity:
    """Perplexity over the first `length` tokens of each document; padding does not count."""
    total, count = 0.0, 0
    for part in _chunks(documents, batch, label):
        rows = subject.tokenizer(
            list(part),
            return_tensors="pt",
            truncation=True,
            max_length=length,
            padding=True,
            padding_side="right",
        )
        ids, mask = rows["input_ids"], rows["attention_mask"]
        logits = subject.run(ids, mask).logits[:, :-1].float()
        scored = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        total += float(cross_entropy(logits.flatten(0, 1), scored.flatten(), reduction="sum"))
        count += int((scored != -100).sum())
    return Perplexity(math.exp(total / count), len(documents), count)


def handoff(anchor: Subject, specialist: Subject, fact: facts.Fact) -> str:
    """Text between models: the specialist answers, the anchor reads that as an answered question and answers.

    Of three prompts tried (as a reference, as an expert's word, as an answered question) the one after which the
    anchor's answer is a bare title most often, so that exact match is fair to it.
    """
    asked = facts.qa_prompt(fact)
    told = specialist.answer([asked])[0].strip()
    return anchor.answer([f"{asked} {told}\n{asked}"])[0]


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
