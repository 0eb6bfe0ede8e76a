"""Tables on the screen: as wide as the terminal, and whole where there is none (a pipe, a log, CI)."""

from rich.console import Console
from rich.table import Table

UNBOUNDED = 240  # characters; rich takes 80 where it cannot ask, and cuts figures to fit


def show(table: Table) -> None:
    """Print the table."""
    console = Console()
    (console if console.is_terminal else Console(width=UNBOUNDED)).print(table)
