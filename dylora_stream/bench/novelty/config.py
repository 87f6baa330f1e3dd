"""What a run is asked for, as the command line says it."""

from dataclasses import dataclass
from pathlib import Path

from dylora_stream.core.errors import SettingsError

__all__ = ["ALPHAS", "PARTS", "USUAL_PARTS", "NoveltyBenchConfig"]

USUAL_PARTS = ("leave-one-out", "alarms", "stream", "cost", "scale")
PARTS = (*USUAL_PARTS, "experts")  # trains one a task: minutes to hours
ALPHAS = (0.05, 0.01)  # promised false-alarm rates at which decisions are judged


@dataclass(frozen=True, slots=True, kw_only=True)
class NoveltyBenchConfig:
    """What the command line says."""

    data: Path
    has_labels: bool = True
    """Whether scorers and clusters see the rows' answers."""
    is_stripped: bool = False
    """Whether markers at the beginning of lines (`Title:`, `sentence 1:`) are taken off the inputs."""
    is_training: bool = False
    """Whether the stream's experts are trained and checked on held-out rows; else statistics alone found them."""
    only: tuple[str, ...] = USUAL_PARTS
    twins: tuple[str, ...] = ()
    """Tasks that are one skill: each is left out too, but reported apart; the stream counts them as one."""
    families: tuple[tuple[str, ...], ...] = ()
    """Tasks that one expert serves as well as two, as the part experts finds: the stream counts each family as one."""
    train_rows: int = 120
    """Of each task, to fit experts on."""
    test_rows: int = 100
    """Of each task, to judge."""
    max_tokens: int = 256
    """Of a row, answer included; longer ones are passed over."""
    draws: int = 20
    """Fresh splits over which the false-alarm rate of exchangeable rows is averaged."""
    scale_rows: int = 20_000
    """That learn is fed to see what it holds."""
    seed: int = 0
    work: Path | None = None
    report: Path | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.only) - set(PARTS))
        if unknown or not self.only:
            raise SettingsError(f"there is no part {', '.join(unknown)!r}: use some of {', '.join(PARTS)}")
        if min(self.train_rows, self.test_rows, self.draws, self.scale_rows) < 1:
            raise SettingsError(
                "at least one training row, one test row, one draw and one row of scale are needed"
            )
        if "experts" in self.only and not self.has_labels:
            raise SettingsError("experts are trained on answers: leave out --labels no, or the part experts")
        if len(self.twins) == 1:
            raise SettingsError(f"{self.twins[0]} alone is nobody's twin: --twins names two tasks or more")
        for family in self.families:
            if len(family) < 2:
                raise SettingsError(
                    f"{'+'.join(family)} is no family: --families joins two tasks or more by +"
                )
        named = [task for skill in self.skills for task in skill]
        if twice := sorted({task for task in named if named.count(task) > 1}):
            raise SettingsError(f"{', '.join(twice)} cannot be of two families")

    @property
    def skills(self) -> tuple[tuple[str, ...], ...]:
        """Tasks that the stream counts as one: the twins, and each family."""
        return (self.twins, *self.families) if self.twins else self.families
