"""What two or three agents are used for today, one question at a time: is the answer right, and what did it cost?

Kinds of questions:
`lookup`: what only a specialist knows, asked as it stands;
`json`: the same, to be answered in JSON;
`conversation`: the same, at the end of a conversation about other things;
`routing`: half of these and half general questions, to be answered in the frozen anchor's very words (which a handoff,
whose anchor reads another prompt, can hardly do);
`facts`: held-out facts of the setting's world (a chain is a look-up in two hops).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rc_agents.benchmarks.scores import Better, Score
from rc_agents.benchmarks.tasks.items import first_line

from rc_agents.demo import facts, texts
from rc_agents.demo.facts import Fact, normalise
from rc_agents.errors import ConfigError, nearest
from rc_agents.scoring import Scorer

COSTS = {
    "seconds": "seconds",
    "cpu_seconds": "seconds",
    "first_token_seconds": "seconds",
    "prompt_tokens": "count",
    "completion_tokens": "count",
    "calls": "count",
}
WALL = ("seconds", "first_token_seconds")
"""Wall times of methods that run one after another hang on what else the machine does: printed, and not compared."""
TALK = (
    "User: Good morning! I slept badly and my train was late again.\n"
    "Assistant: I am sorry to hear that. A short walk at noon may help.\n"
    "User: I will try. My sister visits on Friday, and I want to cook something simple.\n"
    "Assistant: A soup with bread is simple, and most people like it.\n"
    "User: Good idea. Back to work now. "
)


@dataclass(frozen=True)
class Ask:
    """A question, and what is right."""

    prompt: str
    right: Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Agents:
    """Questions to agents.

    Args:
        kinds: of the questions.
        count: questions of each kind.
        max_new_tokens: of an answer; one in JSON gets twice as many.
    """

    kinds: tuple[str, ...] = ("lookup", "json", "conversation", "routing")
    count: int = 24
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"no questions are called {kind!r}; {nearest(kind, list(KINDS))}")

    def texts(self, bench: Any) -> list[str]:
        """The questions."""
        return [one.prompt for kind in self.kinds for one in self.asks(bench, kind)]

    def asks(self, bench: Any, kind: str) -> list[Ask]:
        """Returns the questions of a kind; the seed says which."""
        found: list[Ask] = KINDS[kind](bench, self.count, self.tokens(kind))
        return found

    def tokens(self, kind: str) -> int:
        """Returns the most tokens of an answer."""
        return self.max_new_tokens * (2 if kind == "json" else 1)

    def run(self, bench: Any, scorer: Scorer) -> dict[str, Score]:
        """For every kind: `right`, and by question the seconds, the tokens and the model calls."""
        found: dict[str, Score] = {}
        for kind in self.kinds:
            right, costs = [], []
            for one in self.asks(bench, kind):
                before = scorer.cost.to_dict()
                (answer,) = scorer.generate([one.prompt], self.tokens(kind))
                after = scorer.cost.to_dict()
                right.append(float(one.right(answer)))
                costs.append({name: float(after[name] - before[name]) for name in COSTS})
            found[f"{kind}/right"] = Score(values=right)
            for name, unit in COSTS.items():
                values = [row[name] for row in costs]
                better: Better = "neither" if name in WALL else "lower"
                found[f"{kind}/{name}"] = Score(values=values, kind=unit, better=better)
        return found


def says(answer: str, title: str) -> bool:
    """Whether an answer's first line has the title in it, normalised, as whole words."""
    return f" {normalise(title)} " in f" {first_line(answer)} "


def in_json(answer: str, title: str) -> bool:
    """Whether an answer holds a JSON object whose `title` is right, normalised."""
    start, end = answer.find("{"), answer.rfind("}")
    try:
        found = json.loads(answer[start : end + 1])
    except ValueError:
        return False
    return isinstance(found, dict) and normalise(str(found.get("title", ""))) == normalise(title)


def codes(bench: Any, count: int, part: str = "held_out") -> list[Fact]:
    """Returns codes of a part of the demo's facts, drawn by the seed; without a bench the same for every seed."""
    pool: Sequence[Fact] = getattr(facts.load(), part)
    seed = "" if bench is None else bench.seed
    return random.Random(f"agents:{seed}").sample(list(pool), min(count, len(pool)))


def lookups(bench: Any, count: int, tokens: int = 0, part: str = "held_out") -> list[Ask]:
    """Titles of codes."""
    return [
        Ask(facts.question(one), partial(says, title=one.title))
        for one in codes(bench, count, part)
    ]


def _json(bench: Any, count: int, tokens: int) -> list[Ask]:
    ask = '{} Answer as JSON with the keys "code" and "title".'
    return [
        Ask(ask.format(facts.question(one)), partial(in_json, title=one.title))
        for one in codes(bench, count)
    ]


def _conversation(bench: Any, count: int, tokens: int) -> list[Ask]:
    return [Ask(TALK + one.prompt, one.right) for one in lookups(bench, count)]


def _routing(bench: Any, count: int, tokens: int) -> list[Ask]:
    asked = texts.questions(400 + count)[: (count + 1) // 2]

    def as_the_anchor(answer: str, question: str) -> bool:
        (own,) = bench.chat_reference([question], tokens)
        return answer.strip() == str(own).strip()

    general = [Ask(question, partial(as_the_anchor, question=question)) for question in asked]
    mixed = [*lookups(bench, count // 2), *general]
    random.Random(f"routing:{bench.seed}").shuffle(mixed)
    return mixed


def _facts(bench: Any, count: int, tokens: int) -> list[Ask]:
    if not bench.worlds:
        raise ConfigError(f"questions about facts need a world, {bench.setting.name} has none")
    items = bench.exams[0].sets["held_out"]
    chosen = random.Random(f"agents:{bench.seed}").sample(items, min(count, len(items)))
    return [Ask(item.prompt, item.right) for item in chosen]


KINDS: dict[str, Callable[[Any, int, int], list[Ask]]] = {
    "lookup": lookups,
    "json": _json,
    "conversation": _conversation,
    "routing": _routing,
    "facts": _facts,
}
