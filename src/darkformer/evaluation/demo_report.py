"""A demo's record as a terminal table, plots and a self-contained web page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..plots import error_heat_map, loss_by_position, quality_against_bytes
from ..records import write_text
from ..reporting import printable
from .frontier_report import frontier_cells, frontier_notes, frontier_table


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader has to know to read the table rightly."""
    settings, trained = record["settings"], [row for row in record["rows"] if row["name"] == "trained"]
    tokens = next((row["score"]["tokens"] for row in record["rows"] if row.get("score")), 0)
    lines = [
        *frontier_notes(record),
        f"{tokens:,} scored tokens of documents that neither the choice of heads nor calibration has seen. Nothing is "
        f"trained{', but for the last row' if trained else ''}.",
        f"Prefill and tokens/s (of all sequences together): after {settings['prefill']:,} tokens, in turns.",
    ]
    if trained:
        train = record["train"]
        lines.append(
            f"The last row: {train['steps']} steps of {train['batch_size']} × {train['seq_len']} tokens, train="
            f"{train['train']}, seed {train['seed']}; its speed is that of the row before training."
        )
    return lines


def _continued(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(title, generation) of softmax, and of the last row that continued the prompt."""
    rows = [(row["title"], row["continued"]) for row in record["rows"] if "continued" in row]
    return rows if len(rows) < 2 else [rows[0], rows[-1]]


def print_demo(record: Mapping[str, Any], console: Console) -> None:
    """The table, its notes, and both continuations of the prompt side by side."""
    console.print(frontier_table(record))
    for note in notes(record):
        console.print(note, style="dim", markup=False)
    panels = [_generation_panel(*generation) for generation in _continued(record)]
    side = Table.grid(expand=True, padding=(0, 1))
    for _ in panels:
        side.add_column(ratio=1)
    side.add_row(*panels)
    console.print(side)


def _generation_panel(title: str, done: Mapping[str, Any]) -> Panel:
    cost = f"{done['tokens_per_second']:.1f} tokens/s, {done['cache_bytes'] / 1e6:.1f} MB"
    return Panel(
        Text.assemble((printable(done["prompt"]), "bold"), printable(done["text"])),
        title=Text(printable(title)),
        subtitle=cost,
    )


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>darkformer demo</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:.92rem}td,th{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{white-space:pre-wrap;background:#f6f6f6;padding:1rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}small{color:#666}</style></head><body>
<h1>{{ record.model }}, linearized</h1>
<table><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<ul>{% for note in notes %}<li><small>{{ note }}</small></li>{% endfor %}</ul>
{% for title, text, image in figures %}<h2>{{ title }}</h2><p>{{ text }}</p>
<img alt="{{ title }}" src="data:image/png;base64,{{ image }}">{% endfor %}
<h2>The same prompt</h2><div class="pair">
{% for title, done in generations %}<div><h3>{{ title }}</h3><pre><b>{{ done.prompt }}</b>{{ done.text }}</pre>
<small>{{ done.tokens_per_second }} tokens/s, cache of {{ "%.1f"|format(done.cache_bytes / 1e6) }} MB</small></div>
{% endfor %}</div>
<h2>Record</h2><pre>{{ record.environment | tojson(indent=1) }}</pre><pre>{{ settings | tojson(indent=1) }}</pre>
</body></html>
"""


def write_report(record: Mapping[str, Any], out: Path) -> Path:
    """Plots as PNG files under `out/plots` and `out/report.html`, which holds them all. Returns the page."""
    scored = {row["title"]: row["score"]["by_position"] for row in record["rows"] if row.get("score")}
    figures = [
        (
            "Quality against memory",
            "Share of softmax's next-token accuracy, and numbers recalled, against what one sequence keeps.",
            quality_against_bytes(record, out / "plots" / "frontier.png"),
        ),
        (
            "Loss by position",
            "Held-out loss against the token's position: a window hides more, the more there is to see.",
            loss_by_position(scored, out / "plots" / "positions.png"),
        ),
    ]
    constant = next((row for row in record["rows"] if row["name"] == "constant"), None)
    if constant is not None and constant["calibration"]:
        figures.append(
            (
                "Error per layer and head",
                "How far each key/value head's attention output is from softmax's right after calibration, on text "
                "that calibration held back. Above without features, below with them; darker is better.",
                error_heat_map(constant["calibration"], out / "plots" / "error.png"),
            )
        )
    columns, rows = frontier_cells(record)
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    target = out / "report.html"
    page = template.render(
        record=record,
        columns=columns,
        rows=rows,
        notes=notes(record),
        figures=[(name, text, base64.b64encode(path.read_bytes()).decode()) for name, text, path in figures],
        generations=_continued(record),
        settings={name: record[name] for name in ("config", "budget", "train", "data", "settings")},
    )
    write_text(target, printable(page))
    return target
