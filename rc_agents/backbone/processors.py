"""What makes an encoder's inputs of a picture or a sound, as it comes with the encoder."""

from __future__ import annotations

from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor

from ..config import ModelRef
from ..errors import InputError
from .loading import first_line


def load_processor(ref: ModelRef, name: str, *, sound: bool) -> Any:
    """Returns the image processor or feature extractor at an encoder's folder or hub id.

    Args:
        ref: where the encoder comes from.
        name: the encoder's.
        sound: whether it hears, and does not see.

    Raises:
        InputError: there is none.
    """
    what = "feature extractor" if sound else "image processor"
    advice = f"pass processors={{{name!r}: ...}}, its {what}"
    if ref.base is None:
        raise InputError(f"encoder {name!r} was passed in loaded, without its {what}; {advice}")
    options = {"revision": ref.revision} if ref.revision else {}
    kind: Any = AutoFeatureExtractor if sound else AutoImageProcessor
    try:
        return kind.from_pretrained(ref.base, subfolder=ref.subfolder or "", **options)
    except (OSError, ValueError, ImportError, AttributeError, TypeError, KeyError) as error:
        raise InputError(
            f"encoder {name!r} has no {what} at {ref.base}: {first_line(error)}; {advice}"
        ) from error
