"""The hash of the code that a figure comes from: a comment or a line break changes nothing, a statement does."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "rc_agents.benchmarks"


def fingerprint(modules: Iterable[str], package: str = PACKAGE) -> str:
    """Returns the hash of some modules and of all that they import from a package, without comments and docstrings.

    Args:
        modules: full names.
        package: whose modules count.
    """
    parts = [f"{name} {_hash(name)}" for name in sorted(closure(modules, package))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def closure(modules: Iterable[str], package: str = PACKAGE) -> set[str]:
    """Returns some modules with all that they import from a package, directly or not."""
    found: set[str] = set()
    open_ones = list(modules)
    while open_ones:
        name = open_ones.pop()
        if name not in found:
            found.add(name)
            open_ones += _imports(name, package)
    return found


@functools.cache
def _imports(name: str, package: str) -> tuple[str, ...]:
    names: list[str] = []
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    inside = [one for one in names if one.startswith(f"{package}.")]
    return tuple(one for one in inside if _file(one) is not None and not _is_package(one))


@functools.cache
def _hash(name: str) -> str:
    return hashlib.sha256(ast.dump(_tree(name)).encode()).hexdigest()


@functools.cache
def _tree(name: str) -> ast.Module:
    file = _file(name)
    assert file is not None, f"{name} is no module"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            del body[0]
    return tree


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@functools.cache
def _file(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _is_package(name: str) -> bool:
    file = _file(name)
    return file is not None and file.name == "__init__.py"
