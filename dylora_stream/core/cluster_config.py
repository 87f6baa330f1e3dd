"""How waiting rows are gathered, and when a gathering may become an expert: the numbers."""

from dataclasses import dataclass

__all__ = ["ClusteringConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusteringConfig:
    """How waiting rows are gathered."""

    join_similarity: float = 0.15
    """Average similarity from which a row joins a cluster, and two groups are one: a cosine, in (0, 1)."""

    tight_similarity: float = 0.35
    """Average similarity of rows that are one group whatever else, at least `join_similarity`, below 1."""

    kinship: float = 0.75
    """Two groups of which time says nothing are one only if they are this share as alike as each by itself, in (0, 1].
    Simulated streams of 8 log systems hardly mind: mean ARI 0.74 at 0.6, 0.76 at 0.75 and 0.9."""

    together: float = 0.5
    """What having come together adds to the similarity of two groups, and having come apart takes away, at least 0.
    The same streams: mean ARI 0.69 at 0, 0.76 at 0.5."""

    answer_weight: float = 0.5
    """The answer sketch's part in the similarity of two rows that both have one, in [0, 1]."""

    reference_rows: int = 64
    """How many rows the prior reference counts for against the rows seen. More: a lone first skill is one piece sooner;
    fewer: skills of one genre that come at the same time are told apart better."""

    min_cohesion: float = 0.1
    """Average similarity within a cluster that may become an expert, unless each row is tightly like a few others."""

    saturated_rows: int = 24
    """Distinct rows that are enough where the cluster has the wanted number of records and new texts have become
    rare, at least 1: some skills have no more."""

    min_span_ms: int = 0
    """Record time between a ready cluster's first and last row."""

    def __post_init__(self) -> None:
        if not 0 < self.join_similarity < 1:
            raise ValueError(f"join_similarity must lie between 0 and 1, not {self.join_similarity}")
        if not 0 < self.tight_similarity < 1:
            raise ValueError(f"tight_similarity must lie between 0 and 1, not {self.tight_similarity}")
        if not 0 < self.kinship <= 1:
            raise ValueError(f"kinship must lie in (0, 1], not {self.kinship}")
        if self.together < 0 or self.saturated_rows < 1:
            raise ValueError("together must not be negative, saturated_rows must be at least 1")
        if not 0 <= self.answer_weight <= 1:
            raise ValueError(f"answer_weight must lie in [0, 1], not {self.answer_weight}")
        if self.reference_rows < 0 or self.min_span_ms < 0:
            raise ValueError("reference_rows and min_span_ms must not be negative")
        if not 0 <= self.min_cohesion < 1:
            raise ValueError(f"min_cohesion must lie in [0, 1), not {self.min_cohesion}")
