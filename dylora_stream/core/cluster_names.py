"""Ids of clusters: made from the rows that found them, kept by whoever keeps most of a cluster's rows."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, count

__all__ = ["cluster_names", "digest", "heir", "new_id"]


def cluster_names(
    labels: Sequence[int], before: Sequence[str], row_ids: Sequence[str], used: Iterable[str] = ()
) -> dict[int, str]:
    """A cluster id for each label: the old one of largest overlap, each given once; else a new one, none of `used`."""
    overlaps = Counter(zip(labels, before, strict=True))
    names: dict[int, str] = {}
    taken: set[str] = set()
    for (label, old), _ in sorted(overlaps.items(), key=lambda item: (-item[1], item[0])):
        if label not in names and old not in taken:
            names[label] = old
            taken.add(old)
    for label in sorted(set(labels) - set(names)):
        rows = [row_id for row_id, other in zip(row_ids, labels, strict=True) if other == label]
        names[label] = new_id(rows, {*before, *taken, *used})
        taken.add(names[label])
    return names


def heir(ended: str, before: Sequence[str], after: Sequence[str]) -> str:
    """The cluster that has most rows of one that ended."""
    heirs = [new for old, new in zip(before, after, strict=True) if old == ended]
    return max(sorted(set(heirs)), key=heirs.count)


def new_id(row_ids: Sequence[str], taken: Iterable[str]) -> str:
    """An id made from the founding row, so that a replay gives the same; from a later row where that one is taken."""
    used = set(taken)
    texts = chain(row_ids, (f"{row_ids[0]}#{number}" for number in count()))
    return next(name for name in map(_cluster_name, texts) if name not in used)


def _cluster_name(text: str) -> str:
    return "c-" + digest(text)[:10]


def digest(text: str) -> str:
    """Hexadecimal, an order that has nothing to do with the text."""
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
