"""Which waiting rows the experts may claim: row by row, and only out of clusters that look like theirs as a whole.

A new expert of unlike rows takes for known much of what it has never seen: each row by itself lies no farther than its
own rows do from each other. But of its own rows it would know all but a few, so a cluster of which it knows too few is
somebody else's (a binomial test at `SURELY`), and keeps its rows: ARI on streams of loghub and of `continual/bare` 0.81
instead of 0.66 (two orders each, training rows, experts from 48 rows).

Lost: leaving a cluster alone whose rows are more like one another than like the expert's (a nearest-neighbour
two-sample test). It keeps an expert of mixed rows from taking whole new skills, ARI on three orders of loghub 0.76
instead of 0.72, and keeps a skill's own rows from its expert, on three of `continual/bare` 0.75 instead of 0.79.

Lost: barring an expert from a cluster whose rows come at other times than its own and are less than half as like them
as both are to themselves (what an expert has missed of its own kind is 0.8 to 1.2 times as like, new kinds that it
takes for known -0.5 to 0.5). It kept `android` from taking all of `bgl` in one of three training orders: loghub 0.76
for 0.72, `bare` 0.77 for 0.79. On test orders loghub is the same and one of `bare` 0.67 for 0.72, where what is left
of a skill founds a second expert. Time alone: 0.77 and 0.69 on training rows.

Lost: asking the more of a row that its expert answered wrongly the better the expert is, alpha / (1 - accuracy): 0.68
against 0.69 without (experts from 32 rows).
"""

from collections import defaultdict
from collections.abc import Sequence

from dylora_stream.core.ledger import LedgerRow
from dylora_stream.core.statistics import binomial
from dylora_stream.learn.knowledge import Knowledge, Match

__all__ = ["claims"]

SURELY = 0.01  # chance at which a cluster of an expert's own rows is taken for somebody else's


def claims(rows: Sequence[LedgerRow], matches: Sequence[Match], knowledge: Knowledge) -> dict[str, str]:
    """Position → expert, of the rows that are claimed."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        groups[row.cluster_id or row.position].append(place)
    claimed: dict[str, str] = {}
    for places in groups.values():
        if not _is_theirs([rows[place] for place in places], [matches[place] for place in places], knowledge):
            continue
        for place in places:
            match = matches[place]
            if match.nearest is not None and knowledge.is_known(match):
                claimed[rows[place].position] = match.nearest
    return claimed


def _is_theirs(rows: Sequence[LedgerRow], matches: Sequence[Match], knowledge: Knowledge) -> bool:
    """Whether so many of a cluster's distinct texts are known as would be if it were the experts' own."""
    known = {row.input: knowledge.is_known(match) for row, match in zip(rows, matches, strict=True)}
    return binomial(sum(known.values()), len(known), knowledge.known_share) > SURELY
