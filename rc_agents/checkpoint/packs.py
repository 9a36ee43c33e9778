"""Fills a new specialist's bridges from a saved ensemble that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..topology import ANCHOR, Edge
from .identity import check_fingerprint, put
from .reading import read

if TYPE_CHECKING:
    from ..modeling import CoupledForCausalLM


def load_edges(ensemble: CoupledForCausalLM, path: str | Path, edges: Sequence[Edge]) -> None:
    """Fills the bridges on `edges`.

    Raises:
        CheckpointError: the checkpoint lacks an edge, was made for other bases, or its sites or bridge form differ.
    """
    found = read(path)
    config = found.config
    for edge in edges:
        saved_form, form = (one.bridge_form(edge).to_dict() for one in (config, ensemble.config))
        if saved_form != form:
            raise CheckpointError(
                f"{path}: its bridges have the form {saved_form}, this ensemble's {form}; couple anew with that form"
            )
    for name in dict.fromkeys([ANCHOR, *(end for edge in edges for end in edge)]):
        if name not in (config.names or []):
            continue  # the edges say so below
        saved = [row[(config.names or []).index(name)] for row in config.site_layers or []]
        sites = [row[ensemble.names.index(name)] for row in ensemble.sites]
        if saved != sites:
            raise CheckpointError(
                f"{path}: its bridges are for sites {saved} of {name!r}, this ensemble meets at {sites}; couple anew "
                "with those"
            )
    known = {key.split(".")[1] for key in found.tensors if key.startswith("bridges.")}
    for edge in edges:
        if edge.key not in known:
            raise CheckpointError(
                f"{path} has no bridges {edge.source!r} -> {edge.target!r}; "
                f"it holds {', '.join(sorted(known)) or 'none'}"
            )
    for name in dict.fromkeys(end for edge in edges for end in edge):
        check_fingerprint(path, (config.fingerprints or {}).get(name), ensemble.members[name])
    wanted = [f"bridges.{edge.key}." for edge in edges]
    picked = {name: t for name, t in found.tensors.items() if name.startswith(tuple(wanted))}
    put(ensemble, picked, str(path), only=wanted)
