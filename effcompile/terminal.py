"""How the command line shows tables: as wide as the terminal, or as they need to be in a pipe."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table


def table(*columns: str) -> Table:
    """An empty table with a heading."""
    made = Table(box=None, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def console() -> Console:
    """Made on use, since the command's output may have been redirected."""
    return Console() if sys.stdout.isatty() else Console(width=200)
