"""Refuses suites whose test texts train."""

from __future__ import annotations

from rc_agents.benchmarks.domains import parts
from rc_agents.benchmarks.methods import Bench
from rc_agents.benchmarks.methods.bench import SCORED_QUESTIONS
from rc_agents.benchmarks.specialists import TEACHINGS
from rc_agents.benchmarks.suite import Part
from rc_agents.benchmarks.tasks.items import documents, questions

from rc_agents.errors import DataError
from rc_agents.training import data


class Leak(DataError):
    """A suite whose test texts train."""


def check(part: Part, bench: Bench) -> None:
    """Checks that nothing that trains is, or nearly is, a text that scores.

    Facts are kept apart by their subjects (`World.split`): questions about different ones are alike by design, so of
    questions only equal ones are refused.

    Raises:
        Leak: one is; the message shows it.
    """
    scored = {text for one in part.tasks.values() for text in one.texts(bench)}
    recipe, domain = bench.recipe, part.setting.domain
    sides = {"bridges": domain.documents("bridge") if domain else [], **taught(part)}
    sides["validation"] = domain.documents("validation") if domain else []
    if recipe.train.retain_weight and not part.setting.lessons:
        sides["retained"] = documents("train", recipe.retained_documents)
    for side, texts in sides.items():
        for i, _, similarity in data.near_duplicates(texts, sorted(scored)):
            raise Leak(
                f"setting {part.setting.name}, seed {bench.seed}: a text that trains ({side}) is nearly one that is "
                f"scored (similarity {similarity:.2f}): {texts[i][:60]!r}; take other texts, or say in the suite's "
                "file why it leaks (leaks: ...)"
            )
    prompts = {pair.prompt for pair in bench.pairs()} if part.setting.worlds else set()
    prompts |= {*questions(recipe.retained_questions, skip=SCORED_QUESTIONS)}
    if both := prompts & scored:
        raise Leak(
            f"setting {part.setting.name}, seed {bench.seed}: a question that trains is scored: {min(both)[:60]!r}"
        )


def taught(part: Part) -> dict[str, list[str]]:
    """Returns the texts that the setting's specialists were taught, where it is known."""
    found = {}
    for name, source in part.setting.specialists.items():
        teaching = TEACHINGS.get(source.teaching or "")
        if teaching and teaching.domain:
            found[name] = parts(teaching.domain)["specialist"]
    return found
