"""One pass over the waiting rows: tight groups of alike rows, merged with one another or into an expert.

What one source sends is often a few templates that look nothing alike (8 log systems: ARI 0.73 at best by similarity,
whatever the feature or threshold), so groups of alike rows are merged by whether they come together as well.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dylora_stream.core.arrivals import Timeline, Together, floods
from dylora_stream.core.likeness import WaitingRow
from dylora_stream.core.linkage import FEWEST_ROWS, Groups, MergeRules, average_linkage, merge_groups

__all__ = ["Pass", "Scene", "regroup"]

HEARD = 64  # arrivals of one text, evenly, that the timeline shows: one that always comes would be everyone's neighbour


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a pass looks at. similarity: (n + r, n + r) float32 of the `compared` rows, then of the experts' rows."""

    rows: Mapping[str, WaitingRow]  # all that wait
    compared: Sequence[str]
    similarity: np.ndarray
    owners: Sequence[str]  # experts
    standing: Sequence[int]  # (r,) the expert, by place in `owners`, of each row of an expert
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class Pass:
    """A row's group, the expert it joined, and groups of which time has not told whether they are an expert's."""

    labels: Mapping[str, int]
    joined: Mapping[str, str]
    doubtful: frozenset[int]


def regroup(scene: Scene, tight: float, rules: MergeRules) -> Pass:
    """Groups of average similarity `tight` at least, then merged by the rules."""
    size = len(scene.compared)
    _, labels = np.unique(
        average_linkage(scene.similarity[:size, :size], max(tight, rules.join)), return_inverse=True
    )
    count = int(labels.max()) + 1
    times = np.array([scene.rows[row_id].time_ms for row_id in scene.compared], dtype=np.int64)
    is_flood = floods(times, labels, scene.timeline.interval_ms())
    everyone = np.append(labels, np.array([count + owner for owner in scene.standing], dtype=np.int64))
    groups = Groups(scene.similarity, everyone, len(scene.owners), _together(scene, labels, is_flood))
    left_out = np.zeros(count + len(scene.owners), dtype=bool)
    left_out[:count] = np.bincount(labels, is_flood) > 0.5 * np.bincount(labels)
    merge_groups(groups, rules, left_out)
    labelled = _labelled(scene, groups.parent[labels].tolist(), len(groups.parent))
    joined = {
        row_id: scene.owners[label - count]
        for row_id, label in labelled.items()
        if count <= label < len(groups.parent)
    }
    return Pass(labels=labelled, joined=joined, doubtful=_doubtful(groups, rules.join))


def _together(scene: Scene, labels: np.ndarray, is_flood: np.ndarray) -> Together:
    """What the timeline says of the groups and the experts, as if no flood had been sent, and of one text no more than
    `HEARD` arrivals.

    A source's commonest line may be a single text, 66 of apache's 220 records: it founds nothing, and the expert of the
    other lines would never get it unless it came with them. On three orders of loghub's training rows nobody has 81, 61
    and 178 records of 1760, instead of 212, 92 and 173; ARI is what it was (0.72).
    """
    line = {row_id: number for number, row_id in enumerate(scene.compared)}
    sizes = np.bincount(labels)
    copies, heard = Counter(row.twin or row_id for row_id, row in scene.rows.items()), Counter[str]()
    home: dict[str, int] = {}
    left_out: set[str] = set()
    for row_id, row in scene.rows.items():
        first = row.twin or row_id
        number = line.get(first)
        if number is None:
            continue
        heard[first] += 1
        is_alone = sizes[labels[number]] < FEWEST_ROWS
        is_surplus = is_alone and (heard[first] - 1) % math.ceil(copies[first] / HEARD) > 0
        if is_flood[number] or is_surplus:
            left_out.add(row_id)
        else:
            home[row_id] = int(labels[number])
    experts = {owner: len(sizes) + number for number, owner in enumerate(scene.owners)}
    return scene.timeline.together(home, experts, len(sizes) + len(experts), left_out)


def _labelled(scene: Scene, roots: Sequence[int], count: int) -> dict[str, int]:
    """Every row's group, by what its first row came to; rows too old to be compared go with their cluster."""
    found = dict(zip(scene.compared, roots, strict=True))
    heirs: dict[str, Counter[int]] = {}
    for row_id, root in found.items():
        heirs.setdefault(scene.rows[row_id].cluster_id, Counter())[root] += 1
    result = {}
    for row_id, row in scene.rows.items():
        first = row.twin or row_id
        votes = heirs.setdefault(row.cluster_id, Counter({count + len(heirs): 1}))
        result[row_id] = found[first] if first in found else votes.most_common(1)[0][0]
    return result


def _doubtful(groups: Groups, join: float) -> frozenset[int]:
    """Groups as alike to an expert as rows of one cluster may be, of which the timeline says nothing."""
    experts = np.flatnonzero(groups.is_fixed)
    found = set()
    for group in sorted({int(parent) for parent in groups.parent} - set(experts.tolist())):
        is_alike = groups.content[group, experts] >= join
        found |= {group} if bool((is_alike & (groups.verdicts(group)[experts] == 0)).any()) else set()
    return frozenset(found)
