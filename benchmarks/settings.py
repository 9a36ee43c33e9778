"""The settings of the knowledge-transfer benchmark, as data: models, facts, recipes, numbers of items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any

from rc_agents.benchmarks.domains import Domain
from rc_agents.benchmarks.specialists import SMOLLM2

from rc_agents import BridgeConfig
from rc_agents.training.bridges import TrainConfig
from rc_agents.training.solve import BLEND


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How bridges are built and trained.

    Args:
        sites: the anchor's 1-based blocks, or a mapping from models to blocks for each.
        bridge: the bridges' form.
        edge_bridges: another form for the bridges of an edge, by `source->target`.
        scale: factor on the maps before training, such as four times the identity.
        carrier: how the maps start: "bridge", as the bridge's own config says; "ridge", by regression on general text;
            "vocabulary", from the output layers.
        ridge: lambda of the regression.
        start_documents: documents for it, or to measure the size of the states.
        own: share of the anchor's own state that a warm start takes away; the carrier is then the identity.
        gates: penalty of gates solved by logistic regression before training; None to leave them at their start.
        quiet: share of the retained tokens at which such gates must be shut.
        whole_prompts: whether such gates open for a question's own tokens too.
        strangers: whether such gates are shut on known strangers; for specialists that say nothing of their own there.
        solved: whether the start is all there is; bridges from sources that know nothing are trained all the same.
        train: the trainer's settings; its learning rate and seed are set by the search and the run.
        rates: learning rates tried for the maps.
        search_steps: optimizer steps of each try; None for as many as the run has, whose best is then kept.
        shared_search: whether the first seed that runs searches for all of them; for validation that no seed changes.
        ways: in how many of the trained templates each fact is shown.
        varied: in how many of the hundreds of `phrasings` besides.
        retained_documents, retained_questions: general text, and questions with the anchor's own answers, on which the
            ensemble shall stay the anchor.
    """

    sites: tuple[int | Mapping[str, int], ...] = (30,)
    bridge: BridgeConfig = field(
        default_factory=lambda: BridgeConfig(gate="token", gate_init=-2.0, start="identity")
    )
    edge_bridges: Mapping[str, BridgeConfig] = field(default_factory=dict)
    scale: float = 4.0
    carrier: str = "bridge"
    ridge: float = 1e-3
    start_documents: int = 64
    own: float = 0.0
    gates: float | None = None
    quiet: float = 0.9999
    whole_prompts: bool = False
    strangers: bool = False
    solved: bool = False
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=200,
            learning_rate=1e-4,
            gate_learning_rate=5e-2,
            batch_size=16,
            block_length=72,
            retain_batch_size=4,
            retain_weight=1.5,
        )
    )
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    search_steps: int | None = None
    shared_search: bool = False
    ways: int = 4
    varied: int = 0
    retained_documents: int = 120
    retained_questions: int = 300


def chosen(settings: Any) -> Any:
    """Returns settings as plain data without the fields that have their default value.

    What is hashed of them then stays the same when a new field comes whose default is how things were.
    """
    if is_dataclass(settings):
        found = {}
        for one in fields(settings):
            value, usual = getattr(settings, one.name), one.default
            if one.default_factory is not MISSING:
                usual = one.default_factory()
            if usual is MISSING or value != usual:
                found[one.name] = chosen(value)
        return found
    if isinstance(settings, Mapping):
        return {name: chosen(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [chosen(value) for value in settings]
    return settings


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many items are scored; None for all there are.

    Args:
        held_out: facts asked, of each set of held-out facts.
        crossed: ask each in every template, rather than in one with the templates balanced.
        validation: facts that choose learning rates and prompts.
        strangers: subjects nobody was taught.
        questions: of the anchor's own.
        documents, document_tokens: of general text, and how much of each.
    """

    held_out: int | None = None
    crossed: bool = False
    validation: int | None = None
    strangers: int = 200
    questions: int = 200
    documents: int = 64
    document_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a specialist comes from.

    Args:
        base: id, path or `package:NAME`.
        adapter: of a PEFT adapter on it, or None.
        teaching: name in `specialists.TEACHINGS`, in place of both.
    """

    base: str = SMOLLM2
    adapter: str | None = None
    teaching: str | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of the benchmark.

    Args:
        name: of its folder of results.
        worlds: names in `facts.WORLDS` that are asked about; the first specialists know one each, in this order.
        specialists: by name, in order of addition.
        domain: text that trains bridges and scores them; None for none.
        ensemble: a saved ensemble of these models, whose bridges are taken as they are; None to fit the recipe's.
        lessons: what trains the others then, in `methods.lessons.LESSONS`: what that ensemble's bridges have seen.
        anchor: id, path or `package:NAME`.
        topology: edges between the models, or a preset's name.
        recipe: of the bridges.
        rates: learning rates tried by each other trained method; as many as the recipe's.
        alignment, mix: of the ensembles; None for the usual ones.
        sizes: of the scoring.
        dtype: of the frozen models.
    """

    name: str
    worlds: tuple[str, ...] = ()
    specialists: Mapping[str, Source] = field(default_factory=dict)
    domain: Domain | None = None
    ensemble: str | None = None
    lessons: str = ""
    anchor: str = SMOLLM2
    topology: str | tuple[tuple[str, str], ...] = "unilateral"
    alignment: str | None = None
    mix: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    rates: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "lora": (3e-4, 1e-3, 3e-3),
            "linear_adapter": (3e-5, 1e-4, 3e-4),
            "logit_ensemble": (1e-2, 5e-2, 2e-1),
            "token_logit_ensemble": (1e-3, 1e-2, 5e-2),
        }
    )
    sizes: Sizes = field(default_factory=Sizes)
    dtype: str = "float32"


_SHUTTING = BridgeConfig(gate="token", gate_init=-2.0, gate_floor=0.05, start="identity")
_SHUTTING_ZERO = BridgeConfig(gate="token", gate_init=-2.0, gate_floor=0.05, start="zero")
ANY = Recipe(bridge=_SHUTTING, gates=1e-3, quiet=0.9995, solved=True)
BLENDED = replace(ANY, bridge=BLEND, scale=1.0)
EARLY = replace(
    BLENDED,
    sites=(20,),
    gates=1e-4,
    quiet=0.9999,
    whole_prompts=True,
    retained_questions=800,
)
# The second specialist goes on from the first one's words as if it had read them, the anchor from its last states.
HOPS = Recipe(
    sites=({"anchor": 1, "towns": 30, "words": 1}, {"anchor": 30, "towns": 30, "words": 30}),
    bridge=BLEND,
    edge_bridges={"towns->words": replace(BLEND, reads="prediction")},
    scale=1.0,
    start_documents=300,
    gates=1e-3,
    quiet=0.9995,
    solved=True,
)
OTHER_FAMILY = Recipe(
    bridge=_SHUTTING_ZERO,
    carrier="vocabulary",
    scale=8.0,
    start_documents=8,
    gates=1e-3,
    quiet=0.9995,
    solved=True,
)

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            name="same_family_any",
            worlds=("code_words",),
            specialists={"words": Source(teaching="code_words")},
            recipe=ANY,
        ),
        Setting(
            name="same_family_early",
            worlds=("code_words",),
            specialists={"words": Source(teaching="code_words")},
            recipe=EARLY,
        ),
        Setting(
            name="same_family_abstaining",
            worlds=("code_words",),
            specialists={"words": Source(teaching="abstaining_code_words")},
            recipe=replace(BLENDED, strangers=True),
        ),
        Setting(
            name="same_family_abstaining_specialist",  # who abstains: the gate is shut on nobody
            worlds=("code_words",),
            specialists={"words": Source(teaching="abstaining_code_words")},
            recipe=BLENDED,
        ),
        Setting(
            name="two_specialists",
            worlds=("code_words", "home_towns"),
            specialists={
                "words": Source(teaching="code_words"),
                "towns": Source(teaching="home_towns"),
            },
            recipe=replace(BLENDED, gates=3e-5, varied=4),
        ),
        Setting(
            name="other_family",
            worlds=("code_words",),
            specialists={"words": Source(teaching="gemma_code_words")},
            recipe=OTHER_FAMILY,
        ),
        Setting(
            name="two_hops",
            worlds=("chain",),
            specialists={
                "towns": Source(teaching="home_towns"),
                "words": Source(teaching="town_glossary"),
            },
            topology=(("towns", "words"), ("words", "anchor")),
            recipe=HOPS,
        ),
        Setting(
            name="medical_codes",
            worlds=("medical_codes",),
            specialists={"codes": Source(adapter="package:medical-coding")},
            recipe=ANY,
        ),
    )
}
