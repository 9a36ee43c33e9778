"""A suite with every model, text and size replaced by a tiny one: does it run from end to end?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rc_agents.benchmarks.settings import Sizes, Source
from rc_agents.benchmarks.suite import Part, Suite
from rc_agents.benchmarks.tasks.registry import task
from rc_agents.benchmarks.tiny_models import PREFIX


def suite(whole: Suite) -> Suite:
    """Returns a suite with every model, text and size replaced, to see whether it runs."""
    return replace(whole, parts=tuple(map(_part, whole.parts)))


def _part(part: Part) -> Part:
    setting = part.setting
    recipe = setting.recipe
    train = replace(recipe.train, steps=2, batch_size=2, text_batch_size=2, block_length=32)
    small = Sizes(held_out=4, validation=2, strangers=2, questions=2, documents=2)
    domain = setting.domain and replace(
        setting.domain, source="tiny", form="", bridge=6, validation=2, test=3, window=32, stride=16
    )
    sites = tuple(range(1, 5)) if len(recipe.sites) > 4 else (2, 4)
    made = replace(
        setting,
        anchor=f"{PREFIX}llama",
        specialists={
            name: Source(base=f"{PREFIX}llama-{number}")
            for number, name in enumerate(setting.specialists, start=1)
        },
        recipe=replace(recipe, sites=sites, train=train, rates=recipe.rates[:1]),
        rates={name: rates[:1] for name, rates in setting.rates.items()},
        domain=domain,
        sizes=small,
        dtype="float32",
    )
    tasks = {
        name: task(name, _small(name, options), name) for name, options in part.options.items()
    }
    return replace(part, setting=made, tasks=tasks)


def _small(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a task's options with two packaged questions in the place of the hub's."""
    return {"source": "openbookqa", "count": 2} if name.startswith("choice") else options
