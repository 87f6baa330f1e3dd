"""What the served experts know, as learn sees it: is a row one of theirs?

Serve scored a row against the registry it had; by the time the row arrives here a new expert may have gone live. So
learn asks again, with the newest statistics: rows that waited for an expert find it, and nothing is learned twice.
`score` only; what is called novel never moves the statistics that called it so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dylora_stream.core.experts import ExpertVersion, Registry
from dylora_stream.core.novelty import NoveltyConfig, NoveltyScorer
from dylora_stream.core.ports import IndexFactory
from dylora_stream.core.statistics import ExpertStatistics

__all__ = ["Knowledge", "LoadStatistics", "Match"]

LoadStatistics = Callable[[ExpertVersion], ExpertStatistics]


@dataclass(frozen=True, slots=True)
class Match:
    """The nearest expert of a row, None without one, and the row's p-value, nan where nothing is calibrated."""

    nearest: str | None
    p_value: float


class Knowledge:
    """Novelty against the newest registry; rebuilt when an expert's files change."""

    def __init__(
        self, load: LoadStatistics, index: IndexFactory, config: NoveltyConfig, seed: int = 0
    ) -> None:
        self._load = load
        self._index = index
        self._config = config
        self._seed = seed
        self._loaded: dict[str, ExpertStatistics] = {}
        self._statistics: list[ExpertStatistics] = []
        self._scorer: NoveltyScorer | None = None

    def refresh(self, registry: Registry) -> None:
        """Score against these expert versions from now on. Raises ExpertCorrupt."""
        fresh = {version.storage.sha256: version for version in registry.experts}
        self._loaded = {
            sha256: self._loaded[sha256] if sha256 in self._loaded else self._load(version)
            for sha256, version in fresh.items()
        }
        self._statistics = [self._loaded[version.storage.sha256] for version in registry.experts]
        if not self._statistics:
            self._scorer = None
            return
        rng = np.random.default_rng(self._seed)
        self._scorer = NoveltyScorer.fit(self._statistics, None, self._index, self._config, rng)

    def match(
        self, tenant: str, features: np.ndarray, answers: Sequence[np.ndarray | None] = ()
    ) -> list[Match]:
        """features: (n, D) float32 of one tenant's rows → one match a row; nobody is near while nothing is known.

        answers: an answer row (A,) or None for each, or nothing at all. A right answer tells more than the input: rows
        that read alike and are to be answered differently are told apart by it alone.
        Rows whose input looks known but whose answer was wrong are asked about again with it: by inputs alone an expert
        of unlike rows takes in what is new, and grows by it. With an answer the smaller of both p-values counts, so
        that a new row is taken for known only where input and answer say so (and a known one for new at most twice as
        often as promised; it waits and comes back with its like).
        """
        allowed = np.array([statistics.tenant == tenant for statistics in self._statistics])
        if self._scorer is None or not allowed.any():
            return [Match(None, float("nan"))] * len(features)
        everyone = np.tile(allowed, (len(features), 1))
        scores = self._scorer.score(features, everyone)
        p_values, stacked = scores.p_value, _stacked(answers)
        if stacked is not None:
            scores = self._scorer.score(features, everyone, stacked)
            p_values = np.minimum(p_values, scores.p_value)
        return [
            Match(self._statistics[expert].expert_id, p_value)
            for expert, p_value in zip(scores.nearest.tolist(), p_values.tolist(), strict=True)
        ]

    @property
    def known_share(self) -> float:
        """Of an expert's own rows with answers, how many are called known at least: novel by input or by both, each
        as often as promised."""
        return 1.0 - 2.0 * self._config.alpha

    def is_known(self, match: Match) -> bool:
        """Whether the row is the nearest expert's."""
        return match.nearest is not None and match.p_value > self._config.alpha


def _stacked(answers: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """(n, A) with zeros for rows without an answer; None where no row has one."""
    given = next((answer for answer in answers if answer is not None), None)
    if given is None:
        return None
    return np.stack([np.zeros_like(given) if answer is None else answer for answer in answers])
