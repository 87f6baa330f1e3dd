"""What a run is asked for, as the command line says it."""

from dataclasses import dataclass, replace
from pathlib import Path

from dylora_stream.core.errors import SettingsError
from dylora_stream.core.recipes import Recipe

__all__ = ["DEFAULT_METHODS", "ContinualConfig"]

DEFAULT_METHODS = ("hybrid", "closed_form", "mora", "olora", "sequential", "oracle")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinualConfig:
    """What the command line says. None: as the settings say."""

    data: Path
    orders: tuple[tuple[str, ...], ...]
    """Orders of the same tasks."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: tuple[int, ...] = (0,)
    train_rows: int = 128
    test_rows: int = 100
    max_tokens: int = 256
    """Of a row, answer included; longer ones are passed over."""
    memory: int = 32
    """Stored rows of an expert."""
    epochs: int | None = None
    targets: str = "all"
    """all, attention, mlp, or parts of layers' names."""
    is_whole_matrix: bool = False
    work: Path | None = None
    report: Path | None = None

    def __post_init__(self) -> None:
        if not self.orders or not self.orders[0]:
            raise SettingsError("no task is named: give --tasks a,b,c")
        for order in self.orders:
            if sorted(order) != sorted(self.orders[0]) or len(set(order)) != len(order):
                raise SettingsError(
                    f"the order {','.join(order)} does not hold each task of {','.join(self.orders[0])} once"
                )
        if not self.seeds or not self.methods:
            raise SettingsError("at least one method and one seed are needed: --methods, --seeds")

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe with what is given."""
        longest = max(base.max_row_tokens, self.max_tokens)
        return replace(base, epochs=self.epochs or base.epochs, max_row_tokens=longest)
