"""ICD-10-CM code -> title facts: a small closed world that SmolLM2 does not know and a specialist can be taught.

A fact is one three-character category, such as `A00` -> `Cholera`. The facts fall by code into three splits:
`bridge` trains bridges, `validation` chooses among them, `held_out` is only ever used to score them. The specialist
itself is taught all of them.
"""

import functools
import importlib.util
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rc_agents.errors import PackageError

SEED = 20250101
SPLIT_SIZES = {"bridge": 380, "validation": 40, "held_out": 220}
MAX_TITLE_CHARS = 40
QUESTION = "What is the title of ICD-10-CM code {code}?"
# More ways to ask, for gates that shall open however a code is asked about; up to where the title begins.
PHRASINGS = (
    "ICD-10-CM code {code} is",
    "Q: Tell me the title of {code} in ICD-10-CM.\nA:",
    "User: What is ICD-10-CM {code}?\nAssistant:",
    "The form lists the ICD-10-CM code {code}, whose title is",
    "I forgot the title of ICD-10-CM code {code}. Please remind me: it is",
    "Fill in the blank. The title of ICD-10-CM code {code}:",
    "Quiz. What is asked: an ICD-10-CM title. The code: {code}. Reply:",
)
# Catch-all titles ("Other ...", "... not elsewhere classified") differ by a word and say little about their code.
_VAGUE = re.compile(
    r"[\[\](),\d]|elsewhere|unspecified|classified|^other|^encounter", re.IGNORECASE
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Fact:
    """One code and its title."""

    code: str
    title: str


@dataclass(frozen=True, kw_only=True)
class FactSplits:
    """The facts by use; no code and no normalised title is in two of them."""

    bridge: tuple[Fact, ...]
    validation: tuple[Fact, ...]
    held_out: tuple[Fact, ...]

    @property
    def all(self) -> tuple[Fact, ...]:
        """All facts: what a specialist is taught."""
        return self.bridge + self.validation + self.held_out


@functools.cache
def load(seed: int = SEED) -> FactSplits:
    """Returns the chosen facts, split; the same seed and package version give the same splits.

    Raises:
        PackageError: `simple-icd-10-cm` is not installed.
    """
    pool = _candidates()
    random.Random(seed).shuffle(pool)
    splits, start = {}, 0
    for name, size in SPLIT_SIZES.items():
        splits[name] = tuple(sorted(pool[start : start + size], key=lambda fact: fact.code))
        start += size
    return FactSplits(**splits)


def question(fact: Fact) -> str:
    """Returns the question about a fact, as a user would type it into a chat."""
    return QUESTION.format(code=fact.code)


def qa_prompt(fact: Fact) -> str:
    """Returns the question in plain form, to be completed with a space and the title."""
    return f"Question: {question(fact)}\nAnswer:"


def qa_answer(fact: Fact) -> str:
    """Returns what follows `qa_prompt`; training adds the end-of-text token after it."""
    return f" {fact.title}"


def statement(fact: Fact) -> str:
    """Returns the fact as a sentence."""
    return f"ICD-10-CM code {fact.code} is {fact.title}."


def chat(fact: Fact) -> list[dict[str, str]]:
    """Returns the question as messages for a chat template; the answer expected is the title."""
    return [{"role": "user", "content": question(fact)}]


def chat_prompt(tokenizer: Any, fact: Fact) -> str:
    """Returns the question in a model's own chat template, up to where the assistant answers."""
    return tokenizer.apply_chat_template(chat(fact), tokenize=False, add_generation_prompt=True)


def normalise(title: str) -> str:
    """Returns a title without case, punctuation and extra space: equal ones match exactly."""
    return " ".join(title.casefold().translate(_PUNCTUATION).split())


def matches(answer: str, fact: Fact) -> bool:
    """Returns whether the first line of a generated answer is the fact's title, normalised."""
    lines = answer.strip().splitlines()
    return bool(lines) and normalise(lines[0]) == normalise(fact.title)


def choices(fact: Fact, facts: Sequence[Fact], seed: int, count: int = 10) -> list[str]:
    """Returns the fact's title among `count - 1` others of `facts`, shuffled by the seed and the code."""
    rng = random.Random(f"{seed}:{fact.code}")
    others = sorted({other.title for other in facts} - {fact.title})
    titles = [fact.title, *rng.sample(others, count - 1)]
    rng.shuffle(titles)
    return titles


def _candidates() -> list[Fact]:
    """Returns categories with short, plain titles by code; none of those whose titles are alike."""
    if importlib.util.find_spec("simple_icd_10_cm") is None:
        raise PackageError(
            "the medical facts need the Python package simple-icd-10-cm, which is not installed: "
            "run  pip install simple-icd-10-cm"
        )
    import simple_icd_10_cm as icd

    titles = {
        code: icd.get_description(code) for code in icd.get_all_codes() if icd.is_category(code)
    }
    normalised = [normalise(title) for title in titles.values()]
    repeated = {title for title in normalised if normalised.count(title) > 1}
    return [
        Fact(code, title)
        for code, title in sorted(titles.items())
        if _is_plain(code, title) and normalise(title) not in repeated
    ]


def _is_plain(code: str, title: str) -> bool:
    return (
        bool(re.fullmatch(r"[A-Z]\d\d", code))
        and len(title) <= MAX_TITLE_CHARS
        and not _VAGUE.search(title)
    )
