"""Which block of each model belongs to a meeting point. Block numbers are 1-based: site l lies after block l."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..errors import ConfigError, nearest
from ..topology import ANCHOR

Sites = int | Sequence[int] | Sequence[Mapping[str, int]]


def site_rows(
    sites: Sites, depths: Mapping[str, int], still: Sequence[str] = ()
) -> list[list[int]]:
    """Returns, for every site, the 1-based block of each model after which it meets the others.

    Args:
        sites: a count or the anchor's blocks, as `anchor_sites` takes them, at which the others stand at the same
            share of their depth; or for each site a mapping from models to blocks, at which one model may be far
            ahead of another. A model that a mapping leaves out stands where the anchor's block says. A model may
            stand still from one site to the next, as a source does that others read at its end more than once.
        depths: blocks of every model, the anchor's first.
        still: models that may stand still at sites that do not name them too, as encoders do.

    Raises:
        ConfigError: no site, an unknown model, or blocks that are out of range or do not rise.
    """
    each = list(depths.values())
    if not isinstance(sites, Sequence) or not any(isinstance(one, Mapping) for one in sites):
        blocks = anchor_sites(cast(Any, sites), each[0])
        return matching_layers(blocks, each[0], each, [name in still for name in depths])
    rows = [_named_row(one, depths) for one in sites]
    for column, (name, depth) in enumerate(depths.items()):
        blocks = [row[column] for row in rows]
        wrong = [block for block in blocks if not 1 <= block <= depth]
        if wrong:
            raise ConfigError(f"sites {wrong} lie outside the blocks 1..{depth} of {name!r}")
        if sorted(blocks) != blocks:
            raise ConfigError(f"the sites of {name!r} must not go back, got {blocks}")
    for one, other in itertools.pairwise(rows):
        if one == other:
            raise ConfigError(f"two sites are the same, {dict(zip(depths, one, strict=True))}")
    return rows


def _named_row(site: Any, depths: Mapping[str, int]) -> list[int]:
    if not isinstance(site, Mapping) or ANCHOR not in site:
        raise ConfigError(
            f"a site that names models names the anchor's block too, such as {{'anchor': 12, ...}}; got {site!r}"
        )
    for name, block in site.items():
        if name not in depths:
            raise ConfigError(
                f"a site names an unknown model {name!r}; {nearest(str(name), depths)}"
            )
        if isinstance(block, bool) or not isinstance(block, int):
            raise ConfigError(f"a site is a 1-based block, got {block!r} for {name!r}")
    matched = {
        name: max(1, site[ANCHOR] * depth // depths[ANCHOR]) for name, depth in depths.items()
    }
    return [site.get(name, matched[name]) for name in depths]


def anchor_sites(sites: int | Sequence[int], num_layers: int) -> list[int]:
    """Returns the anchor's blocks after which the models meet.

    Args:
        sites: how many evenly spaced points, the last block included (round(m L / k), m = 1..k; more points than
            blocks meet after every block), or the explicit 1-based blocks.
        num_layers: blocks of the anchor, L.

    Raises:
        ConfigError: no site, or a block outside 1..L.
    """
    if isinstance(sites, bool) or not isinstance(sites, (int, Sequence)) or isinstance(sites, str):
        raise ConfigError(
            "sites is a count, a list of 1-based anchor blocks, or a list of mappings from models to blocks, got "
            f"{sites!r}"
        )
    if isinstance(sites, int):
        if sites < 1:
            raise ConfigError(f"sites={sites}: expected at least 1 meeting point")
        spread = {round(m * num_layers / sites) for m in range(1, sites + 1)}
        return sorted(spread - {0})
    blocks = list(sites)
    if not blocks:
        raise ConfigError("sites is empty: expected at least one 1-based anchor block")
    wrong = [
        b
        for b in blocks
        if isinstance(b, bool) or not isinstance(b, int) or not 1 <= b <= num_layers
    ]
    if wrong:
        raise ConfigError(f"sites {wrong} lie outside the anchor's blocks 1..{num_layers}")
    if sorted(set(blocks)) != blocks:
        raise ConfigError(f"sites must rise without repeats, got {blocks}")
    return blocks


def matching_layers(
    sites: Sequence[int],
    num_anchor_layers: int,
    num_layers: Sequence[int],
    still: Sequence[bool] = (),
) -> list[list[int]]:
    """Returns, for every site kept, the block of each model: max(1, floor(l L_j / L_anchor)).

    A site at which a shallower model would meet twice on one block is dropped with a warning.

    Args:
        sites: 1-based anchor blocks, rising.
        num_anchor_layers: L_anchor.
        num_layers: blocks of every model, the anchor's first.
        still: for each whether it may meet twice on one block; none may where left out.

    Returns:
        One list a site: the anchor's block, then each specialist's.
    """
    rows: list[list[int]] = []
    for site in sites:
        row = [site] + [max(1, site * depth // num_anchor_layers) for depth in num_layers[1:]]
        moves = [not one for one in still] or [True] * len(row)
        clash = rows and any(
            new <= old for new, old, must in zip(row, rows[-1], moves, strict=True) if must
        )
        if clash:
            warnings.warn(
                f"site {site} dropped: a shallower model would meet twice on one of its blocks",
                stacklevel=2,
            )
            continue
        rows.append(row)
    return rows
