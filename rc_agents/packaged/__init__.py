"""Models and text that come with the package index, and what rc_agents ships itself."""

from pathlib import Path

from . import models, shipped
from .models import cache_dir, is_packaged
from .shipped import ASSETS
from .text import TEXTS, text

NAMES = (*models.NAMES, *shipped.SHIPPED)

__all__ = ["ASSETS", "NAMES", "TEXTS", "cache_dir", "fingerprint", "is_packaged", "resolve", "text"]


def resolve(name: str, *, progress: bool = True) -> Path:
    """Returns the folder of a packaged model, or of an adapter or ensemble that rc_agents ships.

    Args:
        name: one of `NAMES`.
        progress: show a progress bar while a model is converted, which happens at its first use.

    Raises:
        PackageError: unknown name, package missing or altered, or a cache that cannot be written.
    """
    if name in shipped.SHIPPED:
        return shipped.folder(name)
    return models.resolve(name, progress=progress)


def fingerprint(name: str) -> str:
    """Returns a packaged part's identity: the hash of its file and the version of our conversion."""
    if name in shipped.SHIPPED:
        return shipped.fingerprint(name)
    return models.fingerprint(name)
