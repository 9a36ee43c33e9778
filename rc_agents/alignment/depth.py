"""Which block of each model belongs to a meeting point. Block numbers are 1-based: site l lies after block l."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ..errors import ConfigError


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
        raise ConfigError(f"sites is a count or a list of 1-based anchor blocks, got {sites!r}")
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
    sites: Sequence[int], num_anchor_layers: int, num_layers: Sequence[int]
) -> list[list[int]]:
    """Returns, for every site kept, the block of each model: max(1, floor(l L_j / L_anchor)).

    A site at which a shallower model would meet twice on one block is dropped with a warning.

    Args:
        sites: 1-based anchor blocks, rising.
        num_anchor_layers: L_anchor.
        num_layers: blocks of every model, the anchor's first.

    Returns:
        One list a site: the anchor's block, then each specialist's.
    """
    rows: list[list[int]] = []
    for site in sites:
        row = [site] + [max(1, site * depth // num_anchor_layers) for depth in num_layers[1:]]
        clash = rows and any(new <= old for new, old in zip(row, rows[-1], strict=True))
        if clash:
            warnings.warn(
                f"site {site} dropped: a shallower model would meet twice on one of its blocks",
                stacklevel=2,
            )
            continue
        rows.append(row)
    return rows
