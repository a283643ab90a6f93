"""A demo's record as a terminal table, plots and a self-contained web page."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..plots import accuracy_against_step, error_heat_map

COLUMNS = (
    "attention", "loss", "ppl", "acc.", "of softmax", "MB at 8k", "of KV cache", "s",
)  # fmt: skip


def _row(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in record["rows"] if row["name"] == name)


def far_field_recovery(record: Mapping[str, Any], moment: str = "after") -> float:
    """(loss(exact part) - loss(both)) / (loss(exact part) - loss(softmax)), all sides trained alike."""
    part, both, softmax = (_row(record, n)[moment]["loss"] for n in ("exact-part", "default", "softmax"))
    return (part - both) / (part - softmax) if part != softmax else math.nan


def table_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells: the untouched softmax model first, then every variant after its finetuning."""
    softmax = _row(record, "softmax")
    reference = softmax["after"]["accuracy"]
    untouched = {**softmax, "title": "softmax, as it is", "after": softmax["before"], "seconds": None}
    finetuned = {**softmax, "title": "softmax, finetuned"}
    rows = []
    for row in (untouched, finetuned, *(r for r in record["rows"] if r["name"] != "softmax")):
        after = row["after"]
        rows.append(
            [
                row["title"],
                f"{after['loss']:.3f}",
                f"{after['perplexity']:.2f}",
                f"{after['accuracy']:.1%}",
                f"{after['accuracy'] / reference:.1%}",
                f"{row['state_bytes'] / 1e6:.1f}",
                f"{row['state_bytes'] / row['kv_cache_bytes']:.1%}",
                "" if row["seconds"] is None else f"{row['seconds']:.0f}" if not row["resumed"] else "–",
            ]
        )
    return rows


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader has to know to read the table rightly."""
    budget = record["budget"]
    softmax = _row(record, "softmax")
    tokens, cache = softmax["after"]["tokens"], softmax["kv_cache_bytes"]
    return [
        "'default' is the library's own form: both parts, the exact window and sinks alone, the features alone.",
        f"Each variant: {budget['steps']} steps of {budget['batch_size']} × {budget['seq_len']} tokens, train="
        f"{budget['train']}, same batches and seed {budget['seed']}; scores on {tokens} held-out tokens "
        "(documents never seen in training).",
        "'of softmax' is the share of the finetuned softmax model's accuracy, so adapting to the text earns no credit.",
        f"ppl: perplexity; acc.: next-token accuracy; MB at 8k: state or key/value cache ({cache / 1e6:.1f} MB), one "
        f"sequence at {record['cache_tokens']:,} tokens in float32; s: seconds (– where the run was interrupted).",
        f"Far-field recovery, features beside the exact part: {far_field_recovery(record, 'before'):+.0%} after "
        f"calibration, {far_field_recovery(record):+.0%} after finetuning (0 %: they add nothing; 100 %: softmax).",
    ]


def markdown_table(record: Mapping[str, Any]) -> str:
    """The same table for a README."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in table_rows(record))])


def print_demo(record: Mapping[str, Any], console: Console) -> None:
    """The table, its notes, and both continuations of the prompt side by side."""
    title = f"{record['model']} on {', '.join(record['data'])}, m = {record['config']['num_features']}"
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for cells in table_rows(record):
        table.add_row(*cells, style="bold" if "both parts" in cells[0] else "")
    console.print(table)
    for note in notes(record):
        console.print(note, style="dim", markup=False)
    side = Table.grid(expand=True, padding=(0, 1))
    side.add_column(ratio=1)
    side.add_column(ratio=1)
    side.add_row(*(_generation_panel(_row(record, name)) for name in ("softmax", "default")))
    console.print(side)


def _generation_panel(row: Mapping[str, Any]) -> Panel:
    done = row["generation"]
    title = "softmax, as it is" if row["name"] == "softmax" else "default, finetuned"
    cost = f"{done['tokens_per_second']:.1f} tokens/s, {done['cache_bytes'] / 1e6:.1f} MB"
    return Panel(Text.assemble((done["prompt"], "bold"), done["text"]), title=title, subtitle=cost)


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
    curves = {row["title"]: row["curve"] for row in record["rows"]}
    softmax, default = _row(record, "softmax"), _row(record, "default")
    paths = [accuracy_against_step(curves, out / "plots" / "accuracy.png", exact=softmax["before"]["accuracy"])]
    captions = [("Accuracy against step", "Held-out next-token accuracy before, halfway and after finetuning.")]
    if default["calibration"]:
        paths.append(error_heat_map(default["calibration"], out / "plots" / "error.png"))
        captions.append(
            (
                "Error per layer and head",
                "How far each key/value head's attention output is from softmax's right after calibration, on text "
                "that calibration held back. Above without features, below with them; darker is better.",
            )
        )
    figures = [
        (title, text, base64.b64encode(path.read_bytes()).decode())
        for (title, text), path in zip(captions, paths, strict=True)
    ]
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    target = out / "report.html"
    target.write_text(
        page.render(
            record=record,
            columns=COLUMNS,
            rows=table_rows(record),
            notes=notes(record),
            figures=figures,
            generations=[
                ("softmax, as it is", softmax["generation"]),
                ("default, finetuned", default["generation"]),
            ],
            settings={name: record[name] for name in ("config", "budget", "data")},
        ),
        encoding="utf-8",
    )
    return target
