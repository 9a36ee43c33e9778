"""Texts that are nearly the same: all pairs whose shingles overlap enough, none missed.

The similarity is that of Jaccard: shingles in common over shingles in either. Candidates are found by prefix
filtering, exact unlike hashing into bands: with shingles in one order, rarest first, two texts as similar as
asked for must share one among their first few (Xiao et al., Efficient similarity joins for near-duplicate
detection, 2011, doi:10.1145/2000824.2000825).

Shapes: N texts, E entries of an inverted index, P pairs of texts.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rc_agents.errors import DataError
from rc_agents.training.data.records import Record
from rc_agents.training.data.shingles import Shingles, distinct, normalise, shingles

# Finds 99 % of the copies of a paragraph in which 8 % of the words were changed (with 0.7: 6 %), and joins no
# two PubMed abstracts.
THRESHOLD = 0.5
_CANDIDATES = 1 << 21  # pairs, and
_COMPARED = 1 << 20  # shingles held at once
_EPS = 1e-9  # so that 0.7 x 10 is 7

_Ints = NDArray[np.int64]


def near_duplicates(
    a: Iterable[Record | str], b: Iterable[Record | str], threshold: float = THRESHOLD
) -> Iterator[tuple[int, int, float]]:
    """Yields (i, j, similarity) for every record of `a` and of `b` that are near-duplicates.

    Case, punctuation and white space do not count. A pair is compared by its prompt, a conversation by what
    the user says first, any record with an `origin` by that.

    Args:
        a: records or texts.
        b: records or texts.
        threshold: the least similarity, above 0 and at most 1.

    Raises:
        DataError: the threshold is none.
    """
    sides: list[defaultdict[bytes, list[int]]] = []
    for records in (a, b):
        places: defaultdict[bytes, list[int]] = defaultdict(list)
        for place, text in enumerate(map(_text, records)):
            places[text].append(place)
        sides.append(places)
    texts = list(dict.fromkeys([*sides[0], *sides[1]]))
    # Texts of one side alone are not compared with one another; those of both sides are with all others.
    side_N = np.array([_side(text, sides, number) for number, text in enumerate(texts)], np.int64)
    same = (
        (number, number, 1.0) for number, text in enumerate(texts) if all(text in s for s in sides)
    )
    seen: set[tuple[int, int]] = set()
    for x, y, similarity in chain(same, _similar(texts, threshold, side_N)):
        if (x, y) in seen:  # a pair may be found again
            continue
        seen.add((x, y))
        for one, other in ((x, y), (y, x))[: 1 if x == y else 2]:
            for i in sides[0].get(texts[one], ()):
                for j in sides[1].get(texts[other], ()):
                    yield i, j, similarity


def duplicate_groups(
    records: Iterable[Record | str], threshold: float = THRESHOLD
) -> list[list[int]]:
    """Returns the places of records that near-duplicates join, by one or by several steps.

    Args:
        records: records or texts, compared as by `near_duplicates`.
        threshold: the least similarity of one step.

    Returns:
        Groups in the order of their first members; a record without near-duplicates is one by itself.
    """
    keys = list(map(_text, records))
    texts = list(dict.fromkeys(keys))
    group_N = np.arange(len(texts))  # by the first text of each
    for x, y, _ in _similar(texts, threshold, group_N):
        first, second = sorted((group_N[x], group_N[y]))
        group_N[group_N == second] = first
    group_of = dict(zip(texts, group_N.tolist(), strict=True))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        groups[group_of[key]].append(place)
    return list(groups.values())


def _text(record: Record | str) -> bytes:
    return normalise(record if isinstance(record, str) else record.key)


def _side(text: bytes, sides: Sequence[Mapping[bytes, Any]], number: int) -> int:
    if text in sides[0] and text in sides[1]:
        return number + 2
    return 0 if text in sides[0] else 1


def _similar(
    texts: Sequence[bytes], threshold: float, group_N: _Ints
) -> Iterator[tuple[int, int, float]]:
    """Yields pairs of different texts of different groups, which may be joined in the meantime."""
    if not 0 < threshold <= 1:
        raise DataError(f"a threshold of similarity lies above 0 and up to 1, not {threshold!r}")
    if not texts:
        return
    found = shingles(texts)
    sizes_N, spread = found.sizes, len(found.counts)
    owned = np.repeat(np.arange(len(texts)), sizes_N) * spread + found.ranks  # ascending
    for candidates in _candidates(found, threshold, group_N):
        cuts = _cuts(np.cumsum(sizes_N[candidates[:, 1]]), _COMPARED)
        for pairs in np.split(candidates, cuts):
            x_P, y_P = pairs[group_N[pairs[:, 0]] != group_N[pairs[:, 1]]].T
            if not len(x_P):
                continue
            shared_P = _shared(found, owned, x_P, y_P)
            similarity_P = shared_P / (sizes_N[x_P] + sizes_N[y_P] - shared_P)
            hit_P = similarity_P >= threshold - _EPS
            yield from zip(
                x_P[hit_P].tolist(), y_P[hit_P].tolist(), similarity_P[hit_P].tolist(), strict=True
            )


def _candidates(found: Shingles, threshold: float, group_N: _Ints) -> Iterator[_Ints]:
    """Yields pairs (x, y), one a row, that may be similar, y the text of fewer shingles; some more than once."""
    sizes_N, number = found.sizes, len(found.sizes)
    probes, index, first, last = _meetings(found, threshold)
    owner_E = np.repeat(np.arange(number), sizes_N)
    left_E = _left(found)
    for part in np.split(np.arange(len(probes)), _cuts(np.cumsum(last - first), _CANDIDATES)):
        joined = _joined(group_N, owner_E[index], owner_E[probes[part]], first[part], last[part])
        part = part[~joined]
        counts = (last - first)[part]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        one = np.repeat(probes[part], counts)
        other = index[np.repeat(first[part], counts) + offsets]
        x_P, y_P = owner_E[one], owner_E[other]
        enough_P = _at_least(threshold / (1 + threshold) * (sizes_N[x_P] + sizes_N[y_P]))
        may_P = np.minimum(left_E[one], left_E[other]) >= enough_P
        may_P &= group_N[x_P] != group_N[y_P]
        pairs_P = distinct(x_P[may_P] * number + y_P[may_P])
        yield np.stack([pairs_P // number, pairs_P % number], axis=1)


def _meetings(found: Shingles, threshold: float) -> tuple[_Ints, _Ints, _Ints, _Ints]:
    """Returns where early shingles meet: probes[n] is the same as each of index[first[n]:last[n]].

    Every similar pair meets: texts x and y share ceil(t / (1 + t) * (|x| + |y|)) shingles or more, so one of
    the first |x| - ceil(t * |x|) + 1 of x and, if y is no longer than x, one of the first
    |y| - ceil(2t / (1 + t) * |y|) + 1 of y. From the first shared one on, both must have enough left.

    Returns:
        Entries of `found.ranks`: of the longer text, of the shorter, and the two ends of each range.
    """
    sizes_N, number = found.sizes, len(found.sizes)
    least_N = _at_least(threshold * sizes_N)
    by_size = np.argsort(sizes_N, kind="stable")
    place_N = np.argsort(by_size)
    smallest_N = np.searchsorted(sizes_N[by_size], least_N)  # place of the first large enough
    owner_E, left_E = np.repeat(np.arange(number), sizes_N), _left(found)
    told_E = found.counts[found.ranks] > 1
    probes = np.flatnonzero(told_E & (left_E >= least_N[owner_E]))
    early_N = _at_least(2 * threshold / (1 + threshold) * sizes_N)
    index = np.flatnonzero(told_E & (left_E >= early_N[owner_E]))
    keys = found.ranks[index] * number + place_N[owner_E[index]]
    order = np.argsort(keys)
    index, keys = index[order], keys[order]
    rows = found.ranks[probes] * number
    first = np.searchsorted(keys, rows + smallest_N[owner_E[probes]])
    last = np.searchsorted(keys, rows + place_N[owner_E[probes]])
    met = last > first
    return probes[met], index, first[met], last[met]


def _left(found: Shingles) -> _Ints:
    """Returns for each entry how many of its text's shingles lie from it to the end."""
    return np.repeat(found.starts[1:], found.sizes) - np.arange(len(found.ranks))


def _joined(group_N: _Ints, index: _Ints, owner: _Ints, first: _Ints, last: _Ints) -> Any:
    """Returns where an owner and all of index[first:last] are of one group, so that there is nothing to ask."""
    groups = group_N[index]
    changes = np.cumsum(np.diff(groups, prepend=groups[:1]) != 0)
    return (changes[last - 1] == changes[first]) & (groups[first] == group_N[owner])


def _cuts(total: _Ints, most: int) -> _Ints:
    """Returns where to cut a running total so that each part adds up to about `most`."""
    return np.flatnonzero(np.diff(total // most)) + 1


def _at_least(count: Any) -> Any:
    """Returns the least whole number that is no less, whatever rounding did to it."""
    return np.ceil(count - _EPS).astype(np.int64)


def _shared(found: Shingles, owned: _Ints, x_P: _Ints, y_P: _Ints) -> _Ints:
    """Returns how many shingles of y are also of x."""
    counts_P = found.sizes[y_P]
    starts_P = np.cumsum(counts_P) - counts_P
    places = np.arange(counts_P.sum()) + np.repeat(found.starts[y_P] - starts_P, counts_P)
    sought = np.repeat(x_P, counts_P) * len(found.counts) + found.ranks[places]
    nearest = np.minimum(np.searchsorted(owned, sought), len(owned) - 1)
    return np.add.reduceat((owned[nearest] == sought).astype(np.int64), starts_P)
