"""A frontier's record as tables for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..reporting import printable


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def frontier_cells(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, a row of cells each) of a record; what a row has not measured is empty."""
    settings, context = record["settings"], record["context"]
    distances = settings["recall"]["distances"] if settings["recall"] else []
    columns = ["attention", f"loss at {context:,}", "acc.", "of softmax"]
    columns += [f"recall at {distance:,}" for distance in distances]
    columns += [f"MB at {_thousands(length)}" for length in settings["lengths"]]
    columns += [f"of cache at {_thousands(settings['lengths'][0])}"]
    if settings["prefill"]:
        columns.append(f"prefill {_thousands(settings['prefill'])}, s")
        columns += [f"tokens/s × {batch}" for batch in settings["batches"]]
    softmax = softmax_row(record)
    reference = softmax["score"]["accuracy"] if softmax else 0.0
    rows = []
    for row in record["rows"]:
        score, cells = row.get("score"), [row["title"]]
        cells += [f"{score['loss']:.3f}", f"{score['accuracy']:.1%}"] if score else ["", ""]
        cells.append(f"{score['accuracy'] / reference:.1%}" if score and reference else "")
        points = {point["distance"]: point for point in row.get("recall", [])}
        cells += [f"{points[distance]['accuracy']:.0%}" if distance in points else "" for distance in distances]
        kept, cache = row.get("bytes", {}), row.get("kv_cache_bytes", {})
        cells += [f"{kept[str(length)] / 1e6:.1f}" if kept else "" for length in settings["lengths"]]
        first = str(settings["lengths"][0])
        cells.append(f"{kept[first] / cache[first]:.1%}" if kept else "")
        if settings["prefill"]:
            cells.append(f"{row['prefill']['median']:.2f}" if "prefill" in row else "")
            speeds = {point["batch"]: point["tokens_per_second"] for point in row.get("generation", [])}
            cells += [f"{speeds[batch]:.1f}" if batch in speeds else "" for batch in settings["batches"]]
        rows.append(cells)
    return columns, rows


def softmax_row(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row that the others are compared with, if it was scored."""
    return next((row for row in record["rows"] if row["config"] is None and row.get("score")), None)


def frontier_notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader has to know to read the table rightly, and which rows failed."""
    settings, asked = record["settings"], record["settings"]["recall"]
    notes = [
        f"Loss and next-token accuracy at {record['context']:,} tokens; MB: what one sequence keeps, with keys and "
        f"values of {settings['element_bytes']} bytes a number; {settings['dtype']}."
    ]
    if asked:
        notes.append(f"Recall: share of {asked['trials']} numbers a distance that are written whole.")
    return notes + [f"{row['title']} failed: {row['error']}" for row in record["rows"] if row["error"]]


def frontier_markdown(record: Mapping[str, Any], columns: Sequence[str] | None = None) -> str:
    """The table for a page.

    Args:
        columns: titles of the columns to show beside the first, in this order; all of them if None.

    Raises:
        InputError: a title that the record's table does not have.
    """
    titles, rows = frontier_cells(record)
    shown = titles[1:] if columns is None else columns
    if unknown := [title for title in shown if title not in titles]:
        raise InputError(f"the frontier's table has no column {', '.join(unknown)}: choose among {', '.join(titles)}.")
    places = [0, *map(titles.index, shown)]
    lines = [[row[place] for place in places] for row in (titles, *rows)]
    header, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([header, "|---|" + "---:|" * len(shown), *body])


def frontier_table(record: Mapping[str, Any]) -> Group:
    """The table for a terminal, in two halves, so that it fits eighty columns: quality, and what it costs."""
    columns, rows = frontier_cells(record)
    cost = next(i for i, column in enumerate(columns) if column.startswith("MB at"))
    tables = []
    for title, chosen in (("quality", range(1, cost)), ("cost", range(cost, len(columns)))):
        heading = Text(printable(f"{record['model']}: {title}"))
        table = Table(title=heading, box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
        for i in (0, *chosen):
            table.add_column(columns[i], justify="right" if i else "left", no_wrap=i == 0)
        for cells in rows:
            table.add_row(*(Text(printable(cells[i])) for i in (0, *chosen)))
        tables.append(table)
    return Group(*tables)


def print_frontier(record: Mapping[str, Any], console: Console) -> None:
    """Table and notes."""
    console.print(frontier_table(record))
    for note in frontier_notes(record):
        console.print(note, style="dim", markup=False)
