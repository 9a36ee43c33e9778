"""A suite of benchmarks as data: `suites/NAME.yaml` says which models, methods, tasks and seeds.

```yaml
about: one line
seeds: [0, 1, 2]
sets: {core: [frozen_anchor, lora]}         # names for lists of methods, used with a leading @
defaults: {anchor: ..., recipe: {...}}      # of every setting; a setting's own keys go over them, mapping by mapping
settings:
  medical:
    specialists: {medical: {teaching: medical_text}}
    domain: {source: medical}
    methods: ["@core", unilateral]
    tasks: {text: {}, forgetting: {documents: 32}}
published: {medical: {text/perplexity: {lora: 12.3}}}   # figures of others, set beside ours
absent: {lora: why this suite does without it}
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from rc_agents.benchmarks.declared import build
from rc_agents.benchmarks.methods import NAMES
from rc_agents.benchmarks.settings import Setting
from rc_agents.benchmarks.tasks.registry import Task, task

from rc_agents.errors import ConfigError, nearest

SUITES = Path(__file__).parent / "suites"
OWN_KEYS = ("methods", "tasks", "seeds", "leaks")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One setting of a suite with what is run in it.

    Args:
        setting: models, data and recipe.
        methods: names of methods, in the order of the report.
        tasks: by name.
        options: of the tasks, as the file says.
        seeds: of this part.
        leaks: why test texts may train here; empty where they may not.
    """

    setting: Setting
    methods: tuple[str, ...]
    tasks: Mapping[str, Task]
    options: Mapping[str, Any]
    seeds: tuple[int, ...]
    leaks: str = ""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite.

    Args:
        name: of its file and of its folder of results.
        about: one line for the report.
        parts: its settings.
        absent: methods or tasks that it does without, and why.
        published: figures of others by setting, measure and method.
    """

    name: str
    about: str
    parts: tuple[Part, ...]
    absent: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


def names() -> list[str]:
    """Returns the suites that come with the package."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load(name: str | Path) -> Suite:
    """Returns a suite by the name of one that comes with the package, or by the path of a YAML file.

    Raises:
        ConfigError: no such suite, or a mistake in its file; the message says where.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SUITES / f"{name}.yaml"
        if not path.is_file():
            raise ConfigError(
                f"no suite is called {str(name)!r}; {nearest(str(name), names())}, or pass the path of a YAML file"
            )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return suite_of(path.stem, data)


def suite_of(name: str, data: Any) -> Suite:
    """Returns the suite that plain data describes; see the top of this module for its form."""
    where = f"suite {name}"
    if not isinstance(data, Mapping) or not isinstance(data.get("settings"), Mapping):
        raise ConfigError(f"{where}: expected a mapping with 'settings'")
    known = ["about", "seeds", "sets", "defaults", "settings", "absent", "published"]
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")
    parts = [
        _part(f"{where}: settings.{one}", one, _over(data.get("defaults", {}), own or {}), data)
        for one, own in data["settings"].items()
    ]
    return Suite(
        name=name,
        about=str(data.get("about", "")),
        parts=tuple(parts),
        absent=dict(data.get("absent") or {}),
        published=_published(
            where, data.get("published") or {}, {part.setting.name for part in parts}
        ),
    )


def _published(where: str, data: Mapping[str, Any], settings: set[str]) -> Mapping[str, Any]:
    for setting in data:
        if setting not in settings:
            raise ConfigError(
                f"{where}: published figures of {setting!r}, which is no setting; {nearest(setting, sorted(settings))}"
            )
        for measure, figures in data[setting].items():
            for method, figure in figures.items():
                if isinstance(figure, bool) or not isinstance(figure, int | float):
                    raise ConfigError(
                        f"{where}: published.{setting}.{measure}.{method}: expected a number, got {figure!r}"
                    )
    return data


def _part(where: str, name: str, own: Mapping[str, Any], data: Mapping[str, Any]) -> Part:
    seeds = own.get("seeds", data.get("seeds", [0]))
    if not isinstance(seeds, list) or not seeds or not all(type(one) is int for one in seeds):
        raise ConfigError(f"{where}.seeds: expected a list of whole numbers, got {seeds!r}")
    options = own.get("tasks")
    if not isinstance(options, Mapping) or not options:
        raise ConfigError(f"{where}.tasks: expected a mapping from tasks to their options")
    fields = {key: value for key, value in own.items() if key not in OWN_KEYS}
    setting = build(Setting, {"name": name, **fields}, where)
    return Part(
        setting=setting,
        methods=_methods(own.get("methods"), data.get("sets") or {}, f"{where}.methods"),
        tasks={one: task(one, given, f"{where}.tasks") for one, given in options.items()},
        options={str(one): given or {} for one, given in options.items()},
        seeds=tuple(seeds),
        leaks=str(own.get("leaks", "")),
    )


def _methods(given: Any, sets: Mapping[str, Sequence[str]], where: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, str) and one.startswith("@"):
            if one[1:] not in sets:
                raise ConfigError(f"{where}: no set is called {one!r}; {nearest(one, list(sets))}")
            found |= dict.fromkeys(sets[one[1:]])
        else:
            found[one] = None
    for one in found:
        if one not in NAMES:
            raise ConfigError(
                f"{where}: no method is called {one!r}; {nearest(str(one), list(NAMES))}"
            )
    return tuple(found)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns both mappings, the second over the first, level by level; models and texts are replaced whole."""
    found = dict(below)
    for key, value in above.items():
        nested = key in ("recipe", "train", "rates", "sizes", "tasks", "bridge")
        if nested and isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            found[key] = _over(found[key], value)
        else:
            found[key] = value
    return found


def chosen(
    suite: Suite,
    settings: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Suite:
    """Returns a suite with only these settings, methods and seeds; all where none is named.

    Raises:
        ConfigError: a name that the suite does not have.
    """
    has = {
        "setting": [part.setting.name for part in suite.parts],
        "method": sorted({one for part in suite.parts for one in part.methods}),
        "seed": sorted({one for part in suite.parts for one in part.seeds}),
    }
    for kind, wanted in (("setting", settings), ("method", methods), ("seed", seeds)):
        for one in wanted:
            if one not in has[kind]:
                known = nearest(str(one), [str(name) for name in has[kind]])
                raise ConfigError(f"suite {suite.name} has no {kind} {one!r}; {known}")
    parts = [
        replace(
            part,
            methods=tuple(one for one in part.methods if not methods or one in methods),
            seeds=tuple(one for one in part.seeds if not seeds or one in seeds),
        )
        for part in suite.parts
        if not settings or part.setting.name in settings
    ]
    return replace(suite, parts=tuple(parts))
