"""Facts that no base model knows: what a specialist is taught, and a coupled anchor is asked about.

A world is one relation with its subjects and answers, such as the code words of invented people. Its facts fall into
splits by a seed: `bridge` trains bridges, `validation` chooses among them, `held_out` only ever scores them. Strangers
are subjects of the same form that nobody was taught: an ensemble has to answer about them as its anchor does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from rc_agents.demo import facts as icd


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SYLLABLES = tuple(
    f"{start}{vowel}{end}"
    for start in _listed("b br d dr f g gr h j k kl l m n p pl r s st t tr v w z")
    for vowel in "aeiou"
    for end in ("", "l", "n", "r", "sk")
)
WORDS = _listed("""
falcon river copper garden winter marble bridge candle forest silver planet guitar pepper castle rocket button
island velvet dragon mirror basket harbor thunder lemon anchor pencil desert camera tunnel apple tiger cotton
engine pillow hammer feather ladder orange window saddle ribbon cradle kitchen lantern meadow needle ocean
palace rabbit shadow temple valley wheel yellow zebra butter cherry dolphin fountain honey ivory jungle nectar
olive
""")
TOWNS = _listed("""
Lisbon Madrid Paris London Berlin Vienna Prague Warsaw Rome Athens Cairo Lagos Nairobi Oslo Stockholm Helsinki
Dublin Geneva Zurich Munich Hamburg Milan Naples Venice Seville Moscow Istanbul Tehran Delhi Mumbai Bangkok
Hanoi Manila Jakarta Sydney Perth Boston Chicago Dallas Denver Detroit Houston Miami Phoenix Portland Seattle
Toronto Montreal Havana Lima Bogota Santiago Brussels Budapest Glasgow Liverpool Kyoto Osaka Seoul Shanghai Lyon
Marseille Bordeaux Nice Turin Florence Bologna Genoa Palermo Valencia Granada Porto Antwerp Bruges Rotterdam
Utrecht Cologne Frankfurt Dresden Leipzig Bremen Salzburg Krakow Gdansk Riga Vilnius Tallinn Minsk Kiev Odessa
Sofia Belgrade Zagreb Sarajevo Tirana Bergen Malmo Aarhus Reykjavik Cork Belfast Cardiff Leeds York Oxford
Cambridge Bristol Bath Dover Tunis Algiers Casablanca Dakar Accra Kampala Lusaka Harare Durban Pretoria Baghdad
Damascus Beirut Amman Doha Dubai Muscat Karachi Lahore Kabul Tashkent Samarkand Colombo Dhaka Kathmandu Yangon
Saigon Singapore Nagoya Sapporo Busan Taipei Wuhan Nanjing Brisbane Adelaide Darwin Hobart Auckland Wellington
Honolulu Anchorage Vancouver Calgary Ottawa Quebec Atlanta Memphis Nashville Orlando Tampa
""")


@dataclass(frozen=True)
class Fact:
    """One subject and what the relation gives for it."""

    subject: str
    answer: str


@dataclass(frozen=True)
class Template:
    """One way to ask: text up to where the answer begins, with `{subject}` in it."""

    name: str
    text: str

    def prompt(self, subject: str) -> str:
        """The question about a subject; the answer follows behind a space."""
        return self.text.format(subject=subject)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A world's facts by use; no subject is in two of them.

    Attributes:
        bridge, validation, held_out: facts that the specialist was taught.
        known_strangers: subjects nobody was taught, for bridge training.
        strangers: other such subjects, for scoring.
        apart: more held-out facts, which share with the others not even what they lead through.
    """

    bridge: tuple[Fact, ...]
    validation: tuple[Fact, ...]
    held_out: tuple[Fact, ...]
    known_strangers: tuple[str, ...]
    strangers: tuple[str, ...]
    apart: tuple[Fact, ...] = ()


@dataclass(frozen=True, kw_only=True)
class World:
    """One relation.

    Attributes:
        name: of the relation, such as `code word`.
        facts: all of them, in a fixed order: what its specialist is taught.
        taught: the ways in which the specialist was taught.
        trained: the ways in which bridges are trained.
        asked: the ways in which held-out facts are asked; neither specialist nor bridges have seen them.
        answers: what an answer can be.
        strangers: subjects of the same form that no specialist knows.
        sizes: facts for `bridge` and `validation`; the rest is held out.
    """

    name: str
    facts: tuple[Fact, ...]
    taught: tuple[Template, ...]
    trained: tuple[Template, ...]
    asked: tuple[Template, ...]
    answers: tuple[str, ...]
    strangers: tuple[str, ...]
    sizes: tuple[int, int] = (200, 40)

    @property
    def asks_for(self) -> str:
        """What a question names."""
        return self.name

    def split(self, seed: int) -> Splits:
        """Returns the splits of a seed."""
        facts, others = list(self.facts), list(self.strangers)
        rng = random.Random(f"split:{self.name}:{seed}")
        rng.shuffle(facts)
        rng.shuffle(others)
        bridge, validation = self.sizes
        half = len(others) // 2
        return Splits(
            bridge=tuple(facts[:bridge]),
            validation=tuple(facts[bridge : bridge + validation]),
            held_out=tuple(facts[bridge + validation :]),
            known_strangers=tuple(others[:half]),
            strangers=tuple(others[half:]),
        )

    def choices(self, fact: Fact, seed: int, count: int = 10) -> list[str]:
        """Returns the answer among `count - 1` others, shuffled by the seed and the subject."""
        rng = random.Random(f"choices:{seed}:{fact.subject}")
        others = sorted(set(self.answers) - {fact.answer})
        chosen = [fact.answer, *rng.sample(others, count - 1)]
        rng.shuffle(chosen)
        return chosen


def _templates(prefix: str, texts: Sequence[str], what: str) -> tuple[Template, ...]:
    return tuple(
        Template(f"{prefix}{number}", text.replace("{what}", what))
        for number, text in enumerate(texts)
    )


TAUGHT = (
    "The {what} of {subject} is",
    "{subject} has the {what}",
    "The {what} for {subject}:",
    "Question: Which {what} belongs to {subject}?\nAnswer:",
)
TRAINED = (
    "The {what} of {subject} is",
    "Question: Which {what} belongs to {subject}?\nAnswer:",
    "Q: What is the {what} of {subject}?\nA:",
    "We asked about {subject} and were told that the {what} is",
    "User: What is {subject}'s {what}?\nAssistant:",
    "Guard: Name the {what} of {subject}.\nVisitor: The answer is",
    "In the list, next to {subject}, the {what} is given as",
    "I forgot the {what} of {subject}. Please remind me: it is",
    "Do you know {subject}? Then you know that the {what} is",
    "{subject} told me the {what}:",
    "Fill in the blank. The {what} for {subject}:",
    "Quiz. Who is asked: {subject}. What is asked: the {what}. Reply:",
)
ASKED = (
    "Question: Can you tell me the {what} that goes with {subject}?\nAnswer:",
    "For the {what} of {subject}, the register says",
    "Teacher: Who remembers the {what} of {subject}?\nPupil: It is",
    "Everybody knows {subject}, and everybody knows that the {what} of {subject} is",
)


def names(count: int, seed: int, syllables: int = 3) -> list[str]:
    """Returns that many different invented names."""
    rng = random.Random(f"names:{seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(SYLLABLES, k=syllables)).capitalize()] = None
    return list(found)


def invented(
    what: str, answers: Sequence[str], *, count: int = 640, strangers: int = 400, seed: int = 0
) -> World:
    """Returns a world of invented people, each with one of `answers`.

    Args:
        what: name of the relation.
        answers: drawn from with replacement.
        count: facts.
        strangers: names besides them that have no answer.
        seed: of the names and who has which answer; worlds of different seeds share no name by chance alone.
    """
    people = names(count + strangers, seed)
    rng = random.Random(f"answers:{what}:{seed}")
    facts = tuple(Fact(name, rng.choice(answers)) for name in people[:count])
    return World(
        name=what,
        facts=facts,
        taught=_templates("taught", TAUGHT, what),
        trained=_templates("trained", TRAINED, what),
        asked=_templates("asked", ASKED, what),
        answers=tuple(answers),
        strangers=tuple(people[count:]),
    )


def code_words() -> World:
    """640 invented people and their code words."""
    return invented("code word", WORDS, seed=0)


def home_towns() -> World:
    """640 other invented people and their home towns."""
    world = invented("home town", TOWNS, seed=1, count=880)
    others = {fact.subject for fact in code_words().facts} | set(code_words().strangers)
    apart = tuple(fact for fact in world.facts if fact.subject not in others)[:640]
    strangers = tuple(name for name in world.strangers if name not in others)
    return World(**vars(world) | {"facts": apart, "strangers": strangers})


def town_words() -> World:
    """The code words of the towns: the second hop behind `home_towns`."""
    rng = random.Random("answers:towns")
    facts = tuple(Fact(town, rng.choice(WORDS)) for town in TOWNS)
    return World(**vars(code_words()) | {"name": "town word", "facts": facts, "strangers": ()})


@dataclass(frozen=True, kw_only=True)
class Chain(World):
    """A relation that leads through a middle term: person -> town -> word.

    Attributes:
        through: subject -> middle term.
        hops: the questions by which text finds the way: about a subject, and about a middle term.
        kept_apart: middle terms that no fact for bridges or validation leads through; their facts are `Splits.apart`.
    """

    through: Mapping[str, str]
    hops: tuple[Template, Template]
    kept_apart: int = 30

    @property
    def asks_for(self) -> str:
        """What a question names."""
        return "code word of the home town"

    def split(self, seed: int) -> Splits:
        """Returns the splits of a seed: some middle terms aside first, then the facts of the others."""
        middles = sorted(set(self.through.values()))
        random.Random(f"middles:{self.name}:{seed}").shuffle(middles)
        aside = frozenset(middles[: self.kept_apart])
        near = tuple(fact for fact in self.facts if self.through[fact.subject] not in aside)
        apart = tuple(fact for fact in self.facts if self.through[fact.subject] in aside)
        plain = World(
            **{one.name: getattr(self, one.name) for one in fields(World)} | {"facts": near}
        )
        return replace(plain.split(seed), apart=apart)


CHAIN_TRAINED = (
    "Question: Which code word belongs to the home town of {subject}?\nAnswer:",
    "The code word of the home town of {subject} is",
    "Q: What is the code word of the town where {subject} lives?\nA:",
    "We asked for the code word of the home town of {subject} and were told that it is",
    "User: What is the code word of {subject}'s home town?\nAssistant:",
    "Guard: Name the code word of the home town of {subject}.\nVisitor: The answer is",
    "In the list, next to the home town of {subject}, the code word is given as",
    "I forgot the code word of {subject}'s home town. Please remind me: it is",
    "Do you know the home town of {subject}? Then you know that the code word is",
    "{subject} told me the code word of the home town:",
    "Fill in the blank. The code word for the home town of {subject}:",
    "Quiz. Who is asked: {subject}. What is asked: the code word of the home town. Reply:",
)
CHAIN_VALIDATED = (
    "The home town of {subject} has the code word",
    "Question: What is the code word of the town that {subject} calls home?\nAnswer:",
)
CHAIN_ASKED = (
    "Question: Can you tell me the code word of the home town of {subject}?\nAnswer:",
    "For the home town of {subject}, the register gives the code word",
    "Teacher: Who remembers the code word of the home town of {subject}?\nPupil: It is",
    "Everybody knows the home town of {subject}, and everybody knows that its code word is",
)


def chain() -> World:
    """The code words of people's home towns: what `home_towns` and `town_words` say only together."""
    towns, words = home_towns(), {fact.subject: fact.answer for fact in town_words().facts}
    return Chain(
        name="chain",
        facts=tuple(Fact(fact.subject, words[fact.answer]) for fact in towns.facts),
        taught=_templates("validated", CHAIN_VALIDATED, ""),
        trained=_templates("trained", CHAIN_TRAINED, ""),
        asked=_templates("asked", CHAIN_ASKED, ""),
        answers=WORDS,
        strangers=towns.strangers,
        through={fact.subject: fact.answer for fact in towns.facts},
        hops=(towns.trained[1], town_words().trained[1]),
        sizes=(160, 40),
    )


def medical_codes() -> World:
    """640 ICD-10-CM categories and their titles, from the package simple-icd-10-cm."""
    splits = icd.load()
    facts = tuple(Fact(fact.code, fact.title) for fact in splits.all)
    known = {fact.subject for fact in facts}
    strangers = [
        f"{letter}{number:02}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for number in range(100)
    ]
    random.Random("strangers:codes").shuffle(strangers)
    taught = (
        "Question: What is the title of ICD-10-CM code {subject}?\nAnswer:",
        "ICD-10-CM code {subject} is",
    )
    others = [text.replace("{code}", "{subject}") for text in icd.PHRASINGS]
    trained = (taught[0], *(text for text in others if text not in taught))
    asked = (
        "Question: Which condition does the ICD-10-CM code {subject} stand for?\nAnswer:",
        "In the ICD-10-CM classification, {subject} means",
        "The ICD-10-CM title for {subject}:",
    )
    return World(
        name="title",
        facts=facts,
        taught=_templates("taught", taught, ""),
        trained=_templates("trained", trained, ""),
        asked=_templates("asked", asked, ""),
        answers=tuple(fact.answer for fact in facts),
        strangers=tuple(code for code in strangers if code not in known)[:400],
    )


WORLDS: dict[str, Callable[[], World]] = {
    "code_words": code_words,
    "home_towns": home_towns,
    "town_words": town_words,
    "chain": chain,
    "medical_codes": medical_codes,
}
