"""What every method is given: the models, the training data and the validation score of one setting and seed."""

from __future__ import annotations

import hashlib
import json
import math
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks import specialists as taught
from rc_agents.benchmarks.domains import Domain
from rc_agents.benchmarks.facts import WORLDS, Template, World
from rc_agents.benchmarks.methods.lessons import LESSONS
from rc_agents.benchmarks.phrasings import phrasings
from rc_agents.benchmarks.settings import Recipe, Setting, Source, chosen
from rc_agents.benchmarks.tasks.items import documents, questions, validated
from rc_agents.benchmarks.tasks.reference import Reference
from rc_agents.benchmarks.tasks.text import domain_loss
from rc_agents.benchmarks.tasks.transfer import Exam, exact, exam, losses
from rc_agents.benchmarks.tiny_models import place

import rc_agents
from rc_agents import packaged
from rc_agents.demo import facts
from rc_agents.scoring import CausalScorer, Scorer
from rc_agents.service import GenerationParams, GenerationService
from rc_agents.training import data
from rc_agents.training.bridges import TrainConfig

FORMAT = 4  # of what is fitted: raised with every change of a method
VALIDATION_DOCUMENTS = 16
STRANGER_TOKENS, QUESTION_TOKENS = 12, 32
LOOKUP_TOKENS = 16
SCORED_QUESTIONS = 120  # of each file, out of which the anchor's own questions are scored
PERPLEXITY_LIMIT = (
    1.02  # of the frozen anchor's: a learning rate that breaks it is chosen only where all do
)


class NotApplicable(Exception):
    """A method that a setting does not allow; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A method, ready to be scored.

    Attributes:
        scorer: it.
        parameters: values that were trained.
        steps: optimizer steps of the run that is scored.
        search: every try on validation: what was tried, and its scores.
        seconds: wall time of all training, the search included.
        notes: what else belongs in the record.
        model: what was trained, for methods that build on this one.
    """

    scorer: Scorer
    parameters: int = 0
    steps: int = 0
    search: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0
    notes: Mapping[str, Any] = field(default_factory=dict)
    model: Any = None


Method = Callable[["Bench"], Fitted]


@dataclass
class Bench:
    """One setting in one seed.

    Args:
        setting: of the benchmark.
        seed: of the splits and of all training.
        folder: for what may be kept between runs: the anchor's answers, hidden states.
        device: where models go.
        method: that is being fitted.
        code: hash of the code that fits it, in the names of what is kept; empty where nobody asks.
    """

    setting: Setting
    seed: int
    folder: Path
    device: str | None = None
    method: str = ""
    code: str = ""
    made: dict[str, Fitted] = field(default_factory=dict)
    chats: dict[tuple[str, int], str] = field(default_factory=dict)

    def kept(self, name: str, make: Callable[[], Fitted]) -> Fitted:
        """Returns a fitted method that others build on, made once; its model is shared, so nobody may change it."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @property
    def key(self) -> str:
        """The hash of everything that a fitted method depends on, but for the code."""
        return self._key(self.seed)

    @property
    def key_of_all_seeds(self) -> str:
        """The same, without the seed."""
        return self._key(None)

    def _key(self, seed: int | None) -> str:
        about = {
            "format": FORMAT,
            "setting": chosen(self.setting),
            "specialists": list(self.setting.specialists),
            "seed": seed,
            "asked": self.asked,
            "adapters": self.adapters,
            "device": torch.device(self.device or "cpu").type,
        } | ({"code": self.code} if self.code else {})
        text = json.dumps(about | self.phrasings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def phrasings(self) -> dict[str, str]:
        """Hash of the phrasings that bridges are trained in beside the worlds' own; nothing where there are none."""
        if not self.recipe.varied:
            return {}
        text = json.dumps([phrasings(world.asks_for) for world in self.worlds])
        return {"phrasings": hashlib.sha256(text.encode()).hexdigest()[:16]}

    @cached_property
    def adapters(self) -> dict[str, str]:
        """Hash of each specialist's adapter, in a folder or in the package."""
        found = {}
        for name, source in self.setting.specialists.items():
            adapter = self.reference_of(source).adapter
            file = Path(adapter or "") / "adapter_model.safetensors"
            if packaged.is_packaged(adapter):
                found[name] = packaged.fingerprint(adapter)[:16]
            elif file.is_file():
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        return found

    # What is asked.

    @cached_property
    def worlds(self) -> list[World]:
        """What is asked about."""
        return [WORLDS[name]() for name in self.setting.worlds]

    @cached_property
    def exams(self) -> list[Exam]:
        """The questions, one exam a world."""
        return [exam(world, self.seed, self.setting.sizes) for world in self.worlds]

    @cached_property
    def asked(self) -> str:
        """Hash of everything that is asked, and of the facts and templates that may train."""
        about: list[Any] = [
            [item.prompt, item.fact.answer, one.choices.get(item.fact.subject)]
            for one in self.exams
            for items in (*one.sets.values(), one.validation)
            for item in items
        ]
        about += [one.strangers for one in self.exams]
        about += [asdict(world) for world in self.worlds]
        sizes = self.setting.sizes
        about += [questions(sizes.questions), documents("test", sizes.documents)]
        if self.domain:
            about += [self.domain.documents(part) for part in ("bridge", "validation", "test")]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    # The models.

    def reference_of(self, source: Source) -> rc_agents.ModelRef:
        """Returns where a specialist comes from; it is taught now where it has not been."""
        if source.teaching is None:
            return rc_agents.ModelRef(base=place(source.base), adapter=source.adapter)
        base = taught.TEACHINGS[source.teaching].base
        return rc_agents.ModelRef(base=base, adapter=str(taught.path(source.teaching)))

    def couple(self, others: Mapping[str, Any] | None = None, **settings: Any) -> Any:
        """Couples specialists (the setting's by default) with the anchor, by its recipe's sites and bridges.

        Args:
            others: specialists by name.
            settings: of `rc_agents.couple` in place of the recipe's; None for its own default.
        """
        recipe = self.setting.recipe
        if others is None:
            others = {
                name: self.reference_of(source) for name, source in self.setting.specialists.items()
            }
        topology: Any = self.setting.topology
        if not isinstance(topology, str):
            topology = [list(edge) for edge in topology]
        chosen = {
            "topology": topology,
            "sites": list(recipe.sites),
            "bridge": recipe.bridge,
            "edge_bridges": {
                tuple(edge.split("->")): form for edge, form in recipe.edge_bridges.items()
            },
            "dtype": self.setting.dtype,
            "device_map": self.device,
            "alignment": self.setting.alignment,
            "mix": self.setting.mix,
        }
        given = {key: value for key, value in (chosen | settings).items() if value is not None}
        with torch.random.fork_rng(devices=[]):  # bridges that start at random
            torch.manual_seed(zlib.crc32(f"{self.seed}:{self.method}".encode()))
            return rc_agents.couple(self.anchor_name, others, **given)

    @property
    def anchor_name(self) -> str:
        """What the anchor is loaded from."""
        return place(self.setting.anchor)

    def anchor_copy(self) -> Any:
        """Returns the anchor loaded once more, for a method that changes it."""
        alone = rc_agents.couple(
            self.anchor_name, {}, dtype=self.setting.dtype, device_map=self.device
        )
        return alone.models["anchor"]

    @cached_property
    def frozen(self) -> Any:
        """The anchor and the specialists side by side, to be used one by one; nothing of it is trained."""
        return self.couple(
            topology="unilateral",
            bridge=rc_agents.BridgeConfig(),
            edge_bridges={},
            sites=1,
            mix="anchor",
        )

    @property
    def tokenizer(self) -> Any:
        """The anchor's."""
        return self.frozen.tokenizer

    def anchor(self) -> CausalScorer:
        """Returns the frozen anchor's scorer."""
        return CausalScorer(self.frozen, specialists=[])

    def specialist(self, place: int = 0) -> CausalScorer:
        """Returns a frozen specialist's own scorer.

        Raises:
            NotApplicable: there are fewer.
        """
        names = self.frozen.specialists
        if place >= len(names):
            raise NotApplicable(f"the setting has {len(names)} specialist(s)")
        name = names[place]
        return CausalScorer(self.frozen.models[name], self.frozen.tokenizers[name])

    @property
    def untaught(self) -> list[str]:
        """The specialists that would have to be taught first."""
        folder = packaged.cache_dir() / "transfer"
        return [
            name
            for name, source in self.setting.specialists.items()
            if source.teaching and not taught.is_taught(source.teaching, folder / source.teaching)
        ]

    @property
    def shares_base(self) -> bool:
        """Whether every specialist is an adapter on the anchor."""
        refs = [self.reference_of(source) for source in self.setting.specialists.values()]
        return all(ref.base == self.anchor_name and ref.adapter for ref in refs)

    @cached_property
    def reference(self) -> Reference:
        """The frozen anchor's answers."""
        made = str(self.frozen.base_fingerprint("anchor"))
        kind = self.frozen.device.type  # other kernels round otherwise
        name = made if kind == "cpu" else f"{made}-{kind}"
        return Reference(self.anchor, name, self.folder / "references")

    @property
    def states(self) -> Path:
        """Where hidden states are kept."""
        return self.folder / "states"

    # The training data, the same for every trained method.

    @property
    def domain(self) -> Domain | None:
        """The text that is trained and scored."""
        return self.setting.domain

    def lessons(self) -> list[data.Record]:
        """All that trains a method: the domain's text and the facts, or what a saved ensemble's bridges have seen."""
        if self.setting.lessons:
            return LESSONS[self.setting.lessons].known(self)
        texts = self.domain.documents("bridge") if self.domain else []
        return [*self.pairs(), *map(data.Document, texts)]

    def pairs(self, worlds: Sequence[World] | None = None) -> list[data.Pair]:
        """Every bridge fact in some of the trained templates and other phrasings, drawn by the seed."""
        rng, more = (random.Random(f"{name}:{self.seed}") for name in ("ways", "varied"))
        pairs = []
        for world in worlds or self.worlds:
            known = {template.text for template in world.trained}
            kept = {template.text for template in (*validated(world), *world.asked)}
            others = [
                Template("varied", text) for text in phrasings(world.asks_for) if text not in known
            ]
            for fact in world.split(self.seed).bridge:
                ways = rng.sample(world.trained, min(self.recipe.ways, len(world.trained)))
                more_ways = more.sample(others, self.recipe.varied)
                ways += [one for one in more_ways if one.text not in kept]
                pairs += [
                    data.Pair(one.prompt(fact.subject), f" {fact.answer}", one.name) for one in ways
                ]
        return pairs

    def retained(self, worlds: Sequence[World] | None = None) -> list[data.Record]:
        """Where a method shall stay the frozen anchor.

        General text, and what the anchor answers to questions of its own (not those that are scored) and about known
        strangers.
        """
        if self.setting.lessons:
            return LESSONS[self.setting.lessons].silent(self)
        kept: list[data.Record] = [
            data.Document(text) for text in documents("train", self.recipe.retained_documents)
        ]
        asked = questions(self.recipe.retained_questions, skip=SCORED_QUESTIONS)
        replies = self.reference.answers(asked, QUESTION_TOKENS) if asked else []
        kept += [
            data.Pair(prompt, answer, "questions")
            for prompt, answer in zip(asked, replies, strict=True)
            if answer.strip()
        ]
        for world in worlds or self.worlds:
            prompts = [
                world.trained[place % len(world.trained)].prompt(subject)
                for place, subject in enumerate(world.split(self.seed).known_strangers)
            ]
            answers = self.reference.answers(prompts, STRANGER_TOKENS) if prompts else []
            kept += [
                data.Pair(prompt, answer, "strangers")
                for prompt, answer in zip(prompts, answers, strict=True)
                if answer.strip()
            ]
        return kept

    def training(self, rate: float, steps: int | None = None) -> TrainConfig:
        """Returns the recipe's settings with this learning rate, these steps and the run's seed."""
        recipe = self.recipe.train
        changes = {"learning_rate": rate, "steps": steps or recipe.steps, "seed": self.seed}
        return TrainConfig(**{**vars(recipe), **changes})

    @property
    def recipe(self) -> Recipe:
        """How bridges are built and trained."""
        return self.setting.recipe

    def chat_reference(self, prompts: Sequence[str], tokens: int = 32) -> list[str]:
        """Returns the frozen anchor's greedy answers to chats of one turn, each asked by itself; made once."""
        service = GenerationService(
            rc_agents.couple(
                self.frozen.models["anchor"], {}, tokenizers={"anchor": self.tokenizer}
            )
        )
        params = GenerationParams(max_new_tokens=tokens, temperature=0.0)
        for prompt in prompts:
            if (prompt, tokens) not in self.chats:
                asked = [{"role": "user", "content": prompt}]
                self.chats[prompt, tokens] = service.generate(asked, params).text
        return [self.chats[prompt, tokens] for prompt in prompts]

    # The validation score.

    def validate(self, scorer: Scorer) -> dict[str, float]:
        """Scores a method on validation facts and documents alone.

        Returns:
            `exact`, the share right; `logprob`, mean log-probability of the right answer in nats; `perplexity`, on
            general text as a multiple of the frozen anchor's. Of a domain instead `loss`, in nats a token of its
            texts and of their second halves behind the first ones.
        """
        if self.domain:
            return {"loss": domain_loss(scorer, self.domain)}
        right: str = ""
        likely: list[float] = []
        if self.setting.lessons:
            right, likely = self._lookups(scorer)
        for one in self.exams:
            right += exact(scorer, one.validation, one, self.tokenizer)["outcomes"]
            pairs = [(item.prompt, f" {item.fact.answer}") for item in one.validation]
            likely += [found.logprob for found in scorer.loglikelihood(pairs)]
        chosen = documents("validation", VALIDATION_DOCUMENTS)
        found = losses(scorer, chosen, self.setting.sizes.document_tokens, self.reference)
        ratio = math.exp(
            sum(found["nll"]) / sum(found["tokens"])
            - sum(found["anchor_nll"]) / sum(found["anchor_tokens"])
        )
        return {
            "exact": right.count("1") / len(right),
            "logprob": sum(likely) / len(likely),
            "perplexity": ratio,
        }

    def _lookups(self, scorer: Scorer) -> tuple[str, list[float]]:
        """The demo's validation codes, asked in a chat: right or not, and the right title's log-probability."""
        asked = facts.load().validation
        prompts = [facts.chat_prompt(self.tokenizer, fact) for fact in asked]
        answers = scorer.generate(prompts, LOOKUP_TOKENS, first_line=True)
        right = [facts.matches(answer, fact) for answer, fact in zip(answers, asked, strict=True)]
        pairs = [(prompt, fact.title) for prompt, fact in zip(prompts, asked, strict=True)]
        likely = [found.logprob for found in scorer.loglikelihood(pairs)]
        return "".join("01"[one] for one in right), likely


def better(scores: Mapping[str, float]) -> tuple[bool, float, float]:
    """Orders validation scores: general text within the limit first, then exact match, then likelihood; or loss."""
    if "loss" in scores:
        return (True, -scores["loss"], 0.0)
    within = scores["perplexity"] <= PERPLEXITY_LIMIT
    return (
        (within, scores["exact"], scores["logprob"])
        if within
        else (False, -scores["perplexity"], 0.0)
    )
