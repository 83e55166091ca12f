"""A promise beside what was measured."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table


class Row(NamedTuple):
    """One promise: the figure that was measured, the limit it has to keep, and whether it did."""

    promise: str
    measured: str
    limit: str
    ok: bool


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The rows as a table for the terminal, with a verdict at the end of each."""
    table = Table("promise", "measured", "limit", "", title=title, title_justify="left")
    for *texts, ok in rows:
        table.add_row(*(escape(text) for text in texts), "[green]ok[/]" if ok else "[red]FAILED[/]")
    return table
