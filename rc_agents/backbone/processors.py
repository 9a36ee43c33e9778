"""What makes an encoder's inputs of a picture or a sound, as it comes with the encoder."""

from __future__ import annotations

from typing import Any, cast

from transformers import AutoFeatureExtractor, AutoImageProcessor

from ..config import ModelRef
from ..errors import InputError
from .loading import first_line


def load_processor(ref: ModelRef, name: str) -> Any:
    """Returns the image processor or feature extractor at an encoder's folder or hub id.

    Args:
        ref: where the encoder comes from.
        name: the encoder's.

    Raises:
        InputError: there is none.
    """
    advice = f"pass processors={{{name!r}: ...}}, its image processor or feature extractor"
    if ref.base is None:
        raise InputError(f"encoder {name!r} was passed in loaded, without its processor; {advice}")
    options = {"revision": ref.revision} if ref.revision else {}
    reasons, kinds = [], (AutoImageProcessor, AutoFeatureExtractor)
    for kind in cast(tuple[Any, ...], kinds):
        try:
            return kind.from_pretrained(ref.base, subfolder=ref.subfolder or "", **options)
        except (OSError, ValueError, ImportError) as error:
            reasons.append(first_line(error))
    raise InputError(f"encoder {name!r} has no processor at {ref.base}: {reasons[0]}; {advice}")
