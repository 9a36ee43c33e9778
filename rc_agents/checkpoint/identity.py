"""What a checkpoint holds of the ensemble itself, and which bases it was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backbone
from ..assembly import Member
from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..modeling import CoupledForCausalLM


def state_of(ensemble: CoupledForCausalLM) -> dict[str, Tensor]:
    """Returns every tensor that is the ensemble's own: bridges, routers, mixer."""
    tensors = {
        name: tensor for name, tensor in ensemble.state_dict().items() if not name.startswith("lm_")
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def put(
    ensemble: CoupledForCausalLM,
    tensors: Mapping[str, Tensor],
    where: str,
    only: Sequence[str] | None = None,
) -> None:
    """Copies tensors into the ensemble's own state after checking every name and shape; all or nothing.

    Args:
        ensemble: whose bridges, routers and mixer are filled.
        tensors: by name.
        where: the checkpoint, for messages.
        only: beginnings of the names to fill; None for all.

    Raises:
        CheckpointError: missing or extra names, other shapes, or NaN.
    """
    state = ensemble.state_dict(keep_vars=True)
    own = {name: tensor for name, tensor in state.items() if not name.startswith("lm_")}
    if only is not None:
        own = {name: tensor for name, tensor in own.items() if name.startswith(tuple(only))}
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"{where}: the bridges do not fit this ensemble: {len(missing)} missing ({', '.join(missing[:2])}), "
            f"{len(extra)} unexpected ({', '.join(extra[:2])}); save it again with the version that made it"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, this ensemble needs {tuple(tensor.shape)}; "
                "its bases are not those it was made with"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinite values; train it again")
    with torch.no_grad():
        for name, tensor in own.items():
            if not tensor.is_meta:  # of a bridge that another process holds
                tensor.copy_(tensors[name])


def fingerprint(member: Member, *, weights: bool = False) -> str:
    """Returns a member's fingerprint: of its files, or of its weights where it was passed in loaded."""
    if member.live or weights:
        return "weights:" + backbone.weights_hash(member.model)
    return backbone.fingerprint(member.ref, member.model)


def check_fingerprint(path: object, wanted: str | None, member: Member) -> None:
    """Raises `CheckpointError` unless the member is the base that the checkpoint was made with.

    Args:
        path: the checkpoint, for messages.
        wanted: the fingerprint that it holds; None where it holds none.
        member: the model at hand.
    """
    if wanted is None:
        return
    found = fingerprint(member, weights=wanted.startswith("weights:"))
    if found != wanted:
        dtypes = " (a hash of weights in memory also differs by dtype: load them in the saved one)"
        hint = dtypes if wanted.startswith("weights:") else ""
        raise CheckpointError(
            f"{path}: the bridges were made for another {member.name!r}: its fingerprint was {wanted[:24]}..., "
            f"the one at {member.ref.base!r} ({member.model.dtype}) has {found[:24]}...; load the original base"
            f"{hint} or pass check_fingerprints=False"
        )
