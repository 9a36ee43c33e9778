"""Text between models: the specialists answer, the anchor reads what they said and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rc_agents.benchmarks.facts import Chain
from rc_agents.benchmarks.methods.bench import Bench, Fitted, better
from torch import Tensor

from rc_agents.scoring import Cost, Likelihood, Loss, Scorer

TOLD_TOKENS = 24
PROMPTS = {
    "answered question": "{question} {told}\n{question}",
    "reference": "Reference: {question} {told}\n\n{question}",
    "expert": "An expert was asked: {question}\nThe expert said: {told}\n\nNow answer.\n{question}",
    "note": "Note: {told}\n\n{question}",
}


@dataclass
class HandoffScorer:
    """Answers the `Scorer` protocol by way of text.

    Args:
        anchor: answers.
        told: what the specialists say about each question, in as many turns as they need.
        others: the specialists' scorers, for the cost.
        prompt: how the anchor reads it, with `{question}` and `{told}`.
        waited: seconds until the anchor could begin to answer, so far.
    """

    anchor: Scorer
    told: Callable[[Sequence[str]], list[str]]
    others: Sequence[Scorer]
    prompt: str
    waited: float = 0.0

    @property
    def cost(self) -> Cost:
        """What answering has cost so far, for all models."""
        total = self.anchor.cost
        for other in self.others:
            total = total.plus(other.cost)
        first = self.anchor.cost.first_token_seconds + self.waited
        return replace(total, first_token_seconds=first)

    def read(self, prompts: Sequence[str]) -> list[str]:
        """Returns what the anchor reads."""
        return [
            self.prompt.format(question=prompt, told=told)
            for prompt, told in zip(prompts, self.told(prompts), strict=True)
        ]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """As the protocol says."""
        prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
        read = dict(zip(prompts, self.read(prompts), strict=True))
        return self.anchor.loglikelihood([(read[prompt], end) for prompt, end in pairs])

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 16, *, first_line: bool = False
    ) -> list[str]:
        """As the protocol says."""
        begun = time.perf_counter()
        read = self.read(prompts)
        self.waited += time.perf_counter() - begun
        return self.anchor.generate(read, max_new_tokens, first_line=first_line)

    def next_logprobs(self, prompts: Sequence[str]) -> Tensor:
        """As the protocol says."""
        return self.anchor.next_logprobs(self.read(prompts))

    def nll(self, texts: Sequence[str], max_length: int = 128) -> list[tuple[float, int]]:
        """The anchor's own: nobody is asked about a text."""
        return self.anchor.nll(texts, max_length)

    def rolling_nll(self, texts: Sequence[str], window: int = 256, stride: int = 128) -> list[Loss]:
        """The anchor's own, too."""
        return self.anchor.rolling_nll(texts, window, stride)


def text_handoff(bench: Bench) -> Fitted:
    """The prompt that works best on validation, of several."""
    anchor = bench.anchor()
    others = [bench.specialist(place) for place in range(len(bench.frozen.specialists))]
    world = bench.worlds[0] if bench.worlds else None
    told = relay(world, others) if isinstance(world, Chain) else answers(others)
    tried: list[dict[str, Any]] = []
    for name, prompt in PROMPTS.items():
        scores = bench.validate(HandoffScorer(anchor, told, others, prompt))
        tried.append({"prompt": name, **scores})
    best = max(tried, key=better)["prompt"]
    return Fitted(
        scorer=HandoffScorer(anchor, told, others, PROMPTS[best]),
        search=tried,
        notes={
            "prompt": PROMPTS[best],
            "turns": 1 + len(others) if isinstance(world, Chain) else 2,
        },
    )


def answers(specialists: Sequence[Scorer]) -> Callable[[Sequence[str]], list[str]]:
    """Every specialist answers the question as it stands, and the anchor reads all of them."""

    def told(prompts: Sequence[str]) -> list[str]:
        each = [one.generate(prompts, TOLD_TOKENS, first_line=True) for one in specialists]
        return ["; ".join(map(_line, row)) for row in zip(*each, strict=True)]

    return told


def relay(world: Chain, specialists: Sequence[Scorer]) -> Callable[[Sequence[str]], list[str]]:
    """Two turns: the first specialist names the middle term, the second is asked about it.

    Who plans the turns knows whom a question is about; a question about nobody known goes to both as it stands.
    """
    first, second = specialists
    plain = answers(specialists)
    subjects = sorted([*world.through, *world.strangers], key=len, reverse=True)

    def told(prompts: Sequence[str]) -> list[str]:
        found: dict[int, str] = {}
        about = {
            place: subject
            for place, prompt in enumerate(prompts)
            if (subject := next((one for one in subjects if one in prompt), None)) is not None
        }
        if about:
            asked = [world.hops[0].prompt(subject) for subject in about.values()]
            middles = [_line(one) for one in first.generate(asked, TOLD_TOKENS, first_line=True)]
            asked = [world.hops[1].prompt(middle) for middle in middles]
            ends = [_line(one) for one in second.generate(asked, TOLD_TOKENS, first_line=True)]
            found = dict(zip(about, ends, strict=True))
        rest = [place for place in range(len(prompts)) if place not in found]
        if rest:
            found |= dict(zip(rest, plain([prompts[place] for place in rest]), strict=True))
        return [found[place] for place in range(len(prompts))]

    return told


def _line(answer: str) -> str:
    lines = answer.strip().splitlines()
    return lines[0].strip() if lines else ""
