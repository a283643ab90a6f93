"""Where results and errors are printed."""

from __future__ import annotations

from rich.table import Table

from ..console import PlainConsole

console = PlainConsole()
errors = PlainConsole(stderr=True, highlight=False, soft_wrap=True)


def print_rows(rows: list[list[str]], title: str) -> None:
    """A table whose first row is its header."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def print_tables(tables: dict[str, list[list[str]]]) -> None:
    """One table a figure, and the claims."""
    for name, rows in tables.items():
        print_rows(rows, name)
