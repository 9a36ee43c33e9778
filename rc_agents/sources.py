"""What a call shows to encoders: told apart by name, checked before any model runs, encoded once a text.

Shapes: B rows of the batch, S positions of an encoder, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backbone, context
from .backbone import Encoded
from .errors import InputError, nearest

if TYPE_CHECKING:
    from .modeling import CoupledForCausalLM

Shown = Mapping[str, Any]
"""Encoder -> the inputs of all rows by name, or a list with those of each row, None for a row without any."""


def named(ensemble: CoupledForCausalLM, sources: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns what each encoder is shown; takes out of `arguments` what names no encoder but its main input.

    Args:
        ensemble: whose encoders they are.
        sources: what the call gave under this name.
        arguments: the call's other arguments, such as `pixel_values`.

    Raises:
        InputError: an unknown encoder, or an input that several could mean.
    """
    encoders = ensemble.config.encoder_names
    if sources is not None and not isinstance(sources, Mapping):
        raise InputError(
            f"sources is a mapping from encoders to their inputs, got {type(sources).__name__}"
        )
    found = dict(sources or {})
    for name in found:
        if name not in encoders:
            raise InputError(
                f"sources names {name!r}, which is no encoder; {nearest(str(name), encoders)}"
            )
    for argument in {ensemble.models[name].main_input_name for name in encoders} & arguments.keys():
        meant = [name for name in encoders if ensemble.models[name].main_input_name == argument]
        if len(meant) > 1 or meant[0] in found:
            raise InputError(
                f"{argument} could be that of {' or '.join(map(repr, meant))}; "
                f"pass sources={{{meant[0]!r}: {{{argument!r}: ...}}}} alone"
            )
        found[meant[0]] = {argument: arguments.pop(argument)}
    return {name: given for name, given in found.items() if not _is_nothing(given)}


def _is_nothing(given: Any) -> bool:
    if isinstance(given, Mapping):
        return bool(given) and all(value is None for value in given.values())
    return given is None or (
        isinstance(given, (list, tuple)) and bool(given) and all(one is None for one in given)
    )


def checked(
    ensemble: CoupledForCausalLM, shown: Shown, encoded: Mapping[str, Encoded], rows: int
) -> dict[str, Any]:
    """Raises `InputError` unless the inputs fit their encoders and the batch; returns those not encoded yet.

    Args:
        ensemble: whose encoders they are.
        shown: what `named` returned.
        encoded: what the text's encoders have seen already; they may be shown it again, and nothing else.
        rows: of the batch, B.
    """
    for name, given in shown.items():
        if name in encoded:
            if not _same(given, encoded[name].given):
                raise InputError(
                    f"past_key_values holds what {name!r} saw before, and this is something else; "
                    "start from an empty cache"
                )
            continue
        _check_rows(name, _check(ensemble, name, given), rows, ensemble)
    return {name: given for name, given in shown.items() if name not in encoded}


def _check(ensemble: CoupledForCausalLM, name: str, given: Any) -> int:
    """Checks one encoder's inputs; returns how many rows they have."""
    model, where = ensemble.models[name], f"sources[{name!r}]"
    accepted = backbone.accepted_arguments(model) - {"kwargs"}
    if isinstance(given, Mapping):
        inputs = backbone.checked(model, given, where, accepted)
        return len(inputs[model.main_input_name])
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InputError(
            f"{where} is a mapping with {model.main_input_name!r}, or a list with one (or None) a row, "
            f"got {type(given).__name__}"
        )
    shapes = set()
    for row, one in enumerate(given):
        if one is not None:
            value = backbone.checked(model, one, f"{where}[{row}]", accepted)[model.main_input_name]
            shapes.add(tuple(value.shape))
    if any(shape[0] != 1 for shape in shapes) or len(shapes) > 1:
        raise InputError(
            f"{where} is a list, whose entries have one row and one size each, got {sorted(shapes)}; "
            "pad them to one size"
        )
    return len(given)


def _check_rows(name: str, count: int, rows: int, ensemble: CoupledForCausalLM) -> None:
    """One entry a row; inside `generate` rows are repeated for beams and several answers."""
    repeats = context.current(ensemble) is not None and count and not rows % count
    if count != rows and not repeats:
        raise InputError(
            f"sources[{name!r}] has {count} rows for a batch of {rows}; give one a row"
        )


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other.to(one.device)).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)


def encode(ensemble: CoupledForCausalLM, name: str, given: Any, rows: int) -> Encoded:
    """Runs one encoder over what it is shown; returns its states in every row of the batch.

    Rows without anything to see have no real position.
    """
    model = ensemble.models[name]
    inputs, places = _batch(given)
    encoded = backbone.encode(model, inputs, ensemble.key)
    if places is not None:
        encoded = _spread(encoded, places)
    copies = rows // len(encoded.mask)
    if copies > 1:
        encoded = encoded.select(torch.arange(len(encoded.mask)).repeat_interleave(copies))
    encoded.given = given
    return encoded


def _batch(given: Any) -> tuple[Mapping[str, Any], list[int] | None]:
    """Returns the inputs as one batch, and for a list the place of each row in it, -1 for none."""
    if isinstance(given, Mapping):
        return given, None
    present = [one for one in given if one is not None]
    inputs = {
        key: torch.cat([one[key] for one in present]) if isinstance(value, Tensor) else value
        for key, value in present[0].items()
    }
    numbers = iter(range(len(present)))
    return inputs, [-1 if one is None else next(numbers) for one in given]


def _spread(encoded: Encoded, places: Sequence[int]) -> Encoded:
    index = torch.tensor(places)
    spread = encoded.select(index.clamp(min=0))
    seen = (index >= 0).to(spread.mask.device)
    mask = spread.mask & seen[:, None]
    return Encoded([one.masked_fill(~mask[..., None], 0) for one in spread.states], mask)
