"""Novelty: how new a row is to the experts that exist, as a score and as a p-value with a promise.

config   the knobs
layout   the blocks of a feature row
spaces   whitened blocks, and the modes that the index searches
fused    block distances as one number a row and expert
scorer   cross-conformal calibration and the decision: `NoveltyScorer`, what serve and learn use
scorers  the methods from the literature behind one interface, for comparison: `SCORERS`
"""

from dylora_stream.core.novelty.config import NoveltyConfig
from dylora_stream.core.novelty.layout import Block, FeatureLayout
from dylora_stream.core.novelty.scorer import NoveltyScorer, NoveltyScores, distinct, distinct_expert
from dylora_stream.core.novelty.scorers import SCORERS

__all__ = [
    "SCORERS",
    "Block",
    "FeatureLayout",
    "NoveltyConfig",
    "NoveltyScorer",
    "NoveltyScores",
    "distinct",
    "distinct_expert",
]
