"""Tables as commands print them: every value whole, as it is.

On a terminal a value that is too long for its column goes on in the next line; where the output is read by another
program, each row is one line. Nothing in a value is taken for markup.
"""

import sys

from rich.console import Console
from rich.table import Table

__all__ = ["show"]

ENDLESS = 100_000  # columns, where no terminal ends the line


def show(*parts: Table | str) -> None:
    """Print tables and lines on standard output."""
    for part in parts:
        if isinstance(part, Table):
            for column in part.columns:
                column.overflow = "fold"
    width = None if sys.stdout.isatty() else ENDLESS
    Console(width=width, markup=False, emoji=False, highlight=False).print(*parts)
