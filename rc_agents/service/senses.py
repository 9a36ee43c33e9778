"""From pictures and sounds to what an ensemble's encoders take, by each one's own processor."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from .. import backbone
from ..errors import InputError, nearest
from ..modeling import CoupledForCausalLM
from . import media
from .media import PICTURE, SOUND, Media

KINDS = {"pixel_values": PICTURE, "input_values": SOUND}
"""What an encoder takes by the name of its main input."""


class Senses:
    """Shows pictures and sounds to the encoders of an ensemble.

    Args:
        model: the ensemble.
        processors: encoder -> its image processor or feature extractor; one that is not given is read from where the
            encoder was loaded, when it is first needed.

    Raises:
        InputError: a processor for what is no encoder of this ensemble.
    """

    def __init__(
        self, model: CoupledForCausalLM, processors: Mapping[str, Any] | None = None
    ) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._kinds: dict[str, str] | None = None
        if not isinstance(processors, Mapping | None):
            kind = type(processors).__name__
            raise InputError(f"processors is a mapping from encoders to processors, got {kind}")
        self._processors = dict(processors or {})
        names = model.config.encoder_names
        for name, given in self._processors.items():
            if name not in names:
                raise InputError(
                    f"processors names {name!r}, which is no encoder; {nearest(str(name), names)}"
                )
            self._check(name, given)

    def show(self, found: Sequence[Media]) -> dict[str, Any]:
        """Returns the inputs of each encoder that takes what was found, one row of it.

        Raises:
            InputError: nobody takes it, several of a kind, or something that cannot be read.
        """
        with self._lock:  # one picture at a time: unpacked they are large
            return self._shown(found)

    def reasons(self) -> dict[str, str]:
        """Returns why encoders cannot be shown anything, by name; nothing for those that can."""
        found = {}
        for name in self._model.config.encoder_names:
            try:
                self._processor(name)
                if self._kind(name) == PICTURE:
                    media.pillow()
            except InputError as error:
                found[name] = str(error)
        return found

    def kinds(self) -> dict[str, str]:
        """Returns what each encoder takes that can be shown something, `PICTURE` or `SOUND`; looked up once."""
        if self._kinds is None:
            blind = self.reasons()
            kinds = {name: self._kind(name) for name in self._model.config.encoder_names}
            self._kinds = {name: kind for name, kind in kinds.items() if kind and name not in blind}
        return self._kinds

    def _shown(self, found: Sequence[Media]) -> dict[str, Any]:
        shown: dict[str, Any] = {}
        for kind in dict.fromkeys(one.kind for one in found):
            given = [one.data for one in found if one.kind == kind]
            takers = [name for name in self._model.config.encoder_names if self._kind(name) == kind]
            if not takers:
                raise InputError(
                    f"no model of this ensemble takes a {kind}; couple an encoder, or send text alone"
                )
            if len(given) > 1:
                raise InputError(
                    f"an encoder is shown one {kind} a conversation, got {len(given)}; send the last one alone"
                )
            shown |= {name: self._inputs(name, kind, given[0]) for name in takers}
        return shown

    def _kind(self, name: str) -> str | None:
        return KINDS.get(self._model.models[name].main_input_name)

    def _check(self, name: str, processor: Any) -> None:
        hears = isinstance(getattr(processor, "sampling_rate", None), int)
        if not callable(processor) or hears != (self._kind(name) == SOUND):
            wanted = "feature extractor" if self._kind(name) == SOUND else "image processor"
            raise InputError(
                f"the processor of {name!r} is its {wanted}, got {type(processor).__name__}"
            )

    def _inputs(self, name: str, kind: str, data: Any) -> Mapping[str, Any]:
        processor, model = self._processor(name), self._model.models[name]
        options: dict[str, Any] = {"return_tensors": "pt"}
        if kind == PICTURE:
            read = media.picture(data)
        else:
            options["sampling_rate"] = processor.sampling_rate
            read = media.samples(data, processor.sampling_rate).numpy()
            least = backbone.shortest_inputs(model)[model.main_input_name].shape[-1]
            if len(read) < least:
                raise InputError(f"{name!r} hears from {least} samples on, got {len(read)}")
        try:
            made = processor(read, **options)
        except Exception as error:
            raise InputError(
                f"the processor of {name!r} failed: {backbone.first_line(error)!s:.120}"
            ) from error
        accepted = backbone.accepted_arguments(model)
        inputs = {key: value for key, value in made.items() if key in accepted}
        return backbone.checked(model, inputs, f"the processor of {name!r}")

    def _processor(self, name: str) -> Any:
        if name not in self._processors:
            sound = self._kind(name) == SOUND
            found = backbone.load_processor(self._model.members[name].ref, name, sound=sound)
            self._check(name, found)
            self._processors[name] = found
        return self._processors[name]
