"""The specialists of the knowledge-transfer task: which base is taught which world, once, into the user's cache.

`python -m rc_agents.benchmarks.specialists NAME` teaches one; asking for a path teaches what is missing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rc_agents.benchmarks.domains import fingerprint, parts
from rc_agents.benchmarks.facts import TRAINED, WORLDS, World, names
from rc_agents.benchmarks.phrasings import phrasings
from rc_agents.benchmarks.tasks.items import documents, questions

from rc_agents import couple, packaged
from rc_agents.errors import TrainingError
from rc_agents.training.data import TEXT_GROUP, Document, Pair, Record
from rc_agents.training.solve import own_answers
from rc_agents.training.specialize import SpecializeConfig, load_base, specialize

SMOLLM2, GEMMA = "package:smollm2-135m", "package:gemma3-270m"


def _taught(
    steps: int, first: int, last: int | None, *, rank: int = 64, rate: float = 1e-3
) -> SpecializeConfig:
    """Settings for an adapter on the blocks from `first` to `last`, 1-based."""
    return SpecializeConfig(
        frozen_blocks=first - 1,
        last_block=last,
        rank=rank,
        alpha=2 * rank,
        learning_rate=rate,
        steps=steps,
        batch_size=16,
        dtype="float32",
        save_steps=100,
    )


@dataclass(frozen=True)
class Teaching:
    """One specialist: its base, its world and how it is taught.

    Args:
        base: that is adapted.
        world: name in `facts.WORLDS`; empty where it is taught text.
        config: of the training.
        domain: kind of text in `domains.KINDS` whose `specialist` part is taught, instead of a world.
        after: the teaching whose adapter this one goes on from, with `manners` beside the facts; None for none.
        glossary: whether it is also taught to say an answer wherever its subject has just been named.
    """

    base: str
    world: str
    config: SpecializeConfig
    after: str | None = None
    glossary: bool = False
    domain: str = ""


# SmolLM2 has 30 blocks. Its middle third is where facts about a name are looked up; of the two hops from a person to
# a town and from a town to a word, the first is taught to lower blocks than the second.
TEACHINGS = {
    "code_words": Teaching(SMOLLM2, "code_words", _taught(1200, 11, 20)),
    "home_towns": Teaching(SMOLLM2, "home_towns", _taught(1200, 6, 15)),
    "town_glossary": Teaching(SMOLLM2, "town_words", _taught(900, 16, 25), glossary=True),
    "gemma_code_words": Teaching(GEMMA, "code_words", _taught(1200, 1, None, rank=16, rate=5e-4)),
}
ABSTAINING = "abstaining_"
TEACHINGS |= {
    ABSTAINING + name: replace(
        TEACHINGS[name],
        config=replace(TEACHINGS[name].config, steps=600, learning_rate=3e-4),
        after=name,
    )
    for name in ("code_words", "home_towns", "gemma_code_words")
}
TEXT = SpecializeConfig(
    steps=150, rank=8, alpha=16, text_batch_size=4, block_length=192, dtype="float32", save_steps=50
)
TEACHINGS |= {
    f"{kind}_text": Teaching(SMOLLM2, "", TEXT, domain=kind)
    for kind in ("medical", "legal", "python", "scientific")
}
STRANGERS, STRANGERS_SEED = 2400, 2  # names that manners are taught on
STRANGER_TOKENS, QUESTION_TOKENS = 16, 32
SKIPPED, QUESTIONS = (
    300,
    600,
)  # questions of each file left to scoring and gates, and those used here
DOCUMENTS = (500, 700)  # of the general texts for training, whose first ones gates are solved on
GLOSSARY_DOCUMENTS = (700, 1500)
GLOSSARY_WORDS = (3, 20)  # of a document before a subject
GLOSSARY_WAYS = 12  # of each kind for each spelling of a subject
GLOSSARY_SHARE = 0.6
RELATIONS = (
    "birthplace",
    "destination",
    "code word of the birthplace",
    "code word of the destination",
)
VARIED_WAYS = 10  # phrasings of each fact beside those in which it was taught
TAUGHT_AGAIN = (
    20  # times that each of those stands among the hundreds in which strangers are asked about
)
SHARES = {"facts": 0.45, "strangers": 0.3, "questions": 0.15, TEXT_GROUP: 0.1}


def lessons(world: World) -> list[Pair]:
    """Every fact in every way that it is taught; a batch is of one way."""
    return [
        Pair(template.prompt(fact.subject), f" {fact.answer}", template.name)
        for template in world.taught
        for fact in world.facts
    ]


def varied(world: World) -> list[Pair]:
    """Every fact in some of hundreds of phrasings, drawn at random, and in every way that it was taught."""
    rng = random.Random(f"varied:{world.name}")
    ways = phrasings(world.name)
    taught = [template.text for template in world.taught]
    return [
        Pair(text.format(subject=fact.subject), f" {fact.answer}", "facts")
        for fact in world.facts
        for text in [*taught, *rng.sample(ways, VARIED_WAYS)]
    ]


def glossary(world: World, tokenizer: Any) -> list[Pair]:
    """Every fact where its subject has just been named: behind the beginning of some text, or behind a question.

    A bridge that reads a prediction hands over one token, so a subject of several is also named by its first one; the
    six towns that share theirs with two others are told apart by their full names alone. The questions are about
    invented people, in phrasings and relations in which no chain is asked.
    """
    rng = random.Random(f"glossary:{world.name}")
    texts = documents("train", GLOSSARY_DOCUMENTS[1])[GLOSSARY_DOCUMENTS[0] :]
    people = strangers()
    pairs = []
    for fact in world.facts:
        first = tokenizer.decode(
            tokenizer(f" {fact.subject}", add_special_tokens=False).input_ids[:1]
        )
        for named in dict.fromkeys((f" {fact.subject}", first)):
            for _ in range(GLOSSARY_WAYS):
                words = rng.choice(texts).split()[: rng.randint(*GLOSSARY_WORDS)]
                relation, asked = rng.choice(RELATIONS), rng.choice(TRAINED)
                question = asked.replace("{what}", relation).format(subject=rng.choice(people))
                pairs.append(Pair(" ".join(words) + named, f" {fact.answer}", "behind text"))
                pairs.append(Pair(question + named, f" {fact.answer}", "behind a question"))
    return pairs


def manners(base: str, world: World) -> list[Record]:
    """Where a specialist should stay its base: names nobody was taught, general questions and general text.

    Its base's own greedy answers are the lesson. No name, question or text of these is one that the benchmark scores or
    that gates are solved on.
    """
    alone = couple(base, {}, dtype="float32")
    rng = random.Random(f"manners:{world.name}")
    ways = [*phrasings(world.name), *[template.text for template in world.taught] * TAUGHT_AGAIN]
    asked = [rng.choice(ways).format(subject=name) for name in strangers()]
    own = own_answers(alone, asked, max_new_tokens=STRANGER_TOKENS, progress=False)
    general = own_answers(
        alone, questions(QUESTIONS, skip=SKIPPED), max_new_tokens=QUESTION_TOKENS, progress=False
    )
    return [
        *(replace(pair, group="strangers") for pair in own),
        *(replace(pair, group="questions") for pair in general),
        *(Document(text) for text in documents("train", DOCUMENTS[1])[DOCUMENTS[0] :]),
    ]


def strangers() -> list[str]:
    """Returns invented names that are in no world."""
    known = {fact.subject for make in WORLDS.values() for fact in make().facts}
    known |= {name for make in WORLDS.values() for name in make().strangers}
    return [name for name in names(STRANGERS, STRANGERS_SEED) if name not in known]


def path(name: str) -> Path:
    """Where a specialist's adapter lies; taught now where it is missing."""
    folder = packaged.cache_dir() / "transfer" / name
    if not is_taught(name, folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(
            folder.with_name(f"{name}.lock")
        ):  # another process waits for the one that teaches
            if not is_taught(name, folder):
                teach(name, folder)
    return folder


def is_taught(name: str, folder: Path) -> bool:
    """Whether a folder has this specialist, taught as `TEACHINGS` says (where it says how it was taught)."""
    if not (folder / "adapter_config.json").exists():
        return False
    about = folder / "teaching.json"
    if not about.is_file():
        return True
    record = json.loads(about.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(asdict(TEACHINGS[name])))
    domain = TEACHINGS[name].domain
    if domain and record.get("documents") != fingerprint(parts(domain)["specialist"]):
        return False
    return _agree(record["teaching"], now)


def _agree(told: Any, now: Any) -> bool:
    """Whether two settings are alike in all that both have: fields that came later do not count."""
    if isinstance(told, dict) and isinstance(now, dict):
        return all(_agree(told[key], now[key]) for key in told.keys() & now.keys())
    return bool(told == now)


def teach(name: str, folder: Path) -> None:
    """Teaches a specialist and writes how beside it; goes on where an earlier try was interrupted."""
    teaching = TEACHINGS[name]
    kept = [*folder.with_name(f"{folder.name}.unfinished").glob("checkpoint-*")]
    whole = [one for one in kept if (one / "trainer_state.json").is_file()]  # written last
    for one in set(kept) - set(whole):
        shutil.rmtree(one)
    config, adapter = teaching.config, None
    data: list[Record] = []
    if teaching.domain:
        data += map(Document, parts(teaching.domain)["specialist"])
    else:
        world = WORLDS[teaching.world]()
        data += lessons(world)
    if teaching.glossary and teaching.after:
        raise ValueError(f"{name}: a glossary is taught from the start, not after another teaching")
    if teaching.glossary:
        named = glossary(world, load_base(teaching.base, "float32")[1])
        ways = len({pair.group for pair in data})
        config = replace(
            config,
            mix={pair.group: (1 - GLOSSARY_SHARE) / ways for pair in lessons(world)}
            | {pair.group: GLOSSARY_SHARE / 2 for pair in named},
        )
        data += named
    if teaching.after is not None:
        adapter = path(teaching.after)
        data = [*varied(world), *manners(teaching.base, world)]
        config = replace(config, mix=SHARES)
    try:
        taught = specialize(
            teaching.base, data, folder, config, adapter=adapter, resume=bool(whole)
        )
    except TrainingError:
        if not whole:
            raise
        taught = specialize(teaching.base, data, folder, config, adapter=adapter)
    about = {"teaching": asdict(teaching), "seconds": taught.seconds, "loss": taught.loss}
    if teaching.domain:
        about["documents"] = fingerprint(parts(teaching.domain)["specialist"])
    (folder / "teaching.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Teaches the specialists named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="+", choices=TEACHINGS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names:
        print(path(name))


if __name__ == "__main__":
    main()
