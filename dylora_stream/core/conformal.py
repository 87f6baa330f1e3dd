"""The threshold under drift: adaptive conformal inference (Gibbs and Candès 2021, 2106.00170).

A conformal p-value promises its rate on exchangeable rows; streams drift, and known skills show rows that nobody has
seen. After each row that is known to be known, alpha moves: down by rate · (1 - target) when the row was called novel,
up by rate · target when it was not. Whatever the stream does, after T such rows the share called novel lies within
(1 + rate) / (rate · T) of the target: within 0.02 after 1,050 rows at the default rate.

It needs feedback: rows of which it has come to be known that they belong to an expert (a label or a skill name that
arrives late, a waiting row that joined an expert after all). Rows without it move nothing. The long-run rate is a
statement about the mean over time, reported apart from the promise on exchangeable rows: alpha is a control, and a
row's p-value stays what it is. `bench novelty` reports it; the daemon's threshold is `novelty.alpha`, because most
streams have no such feedback.
"""

from dataclasses import dataclass

__all__ = ["AdaptiveAlpha", "AdaptiveConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveConfig:
    """How the threshold follows the stream."""

    target: float = 0.05
    """Long-run share of known traffic called novel, in (0, 0.5)."""

    rate: float = 0.05
    """How far one row moves alpha, in (0, 1). Larger: sooner at the target, and a more restless threshold."""

    def __post_init__(self) -> None:
        if not 0 < self.target < 0.5:
            raise ValueError(f"target must lie between 0 and 0.5, not {self.target}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must lie between 0 and 1, not {self.rate}")


class AdaptiveAlpha:
    """The threshold of one stream. Deciding changes nothing; `update` does."""

    def __init__(self, config: AdaptiveConfig) -> None:
        self._config = config
        self._alpha = config.target

    @property
    def alpha(self) -> float:
        """A row is novel when p <= alpha. At or under 0 nothing is, from 1 on everything."""
        return self._alpha

    def calls(self, p_value: float) -> bool:
        """Whether a row of this p-value is novel; nan, where nothing is calibrated, is."""
        return not p_value > self._alpha

    def update(self, is_known_and_called_novel: bool) -> None:  # noqa: FBT001 - the one thing it is told
        """Learn what was decided about one row that turned out to be known."""
        self._alpha += self._config.rate * (self._config.target - float(is_known_and_called_novel))
