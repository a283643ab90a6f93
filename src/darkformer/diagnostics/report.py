"""A diagnosis as a terminal table, pictures and a self-contained web page."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..records import write_text
from ..reporting import printable
from . import figures as plots
from .summary import HELPS, measured_rows

COLUMNS = ("layer", "head", "rank", "nats", "bal.", "far", "alone", "default", "exact", "×bound", "helps")
#: Heads shown from each end of the ranking.
SHOWN = 5
#: File, title, how to read it.
PICTURES = (
    ("heads", plots.head_maps, "Every head",
     "One square a head. An effective rank far below the head's dimension is anisotropy. Log second moments say how "
     "many draws a pair needs (e to that power): beyond about 10 no affordable number is accurate. The error is the "
     "distance from softmax's output: 0 is exact, 1 as wrong as no answer. Grey: could not be measured. Text and "
     "recall (where measured): what is lost when only this head sees the window and the sinks; few heads matter."),
    ("spectra", plots.spectra, "Spectra",
     "Isotropic inputs would be flat lines. Centring and balancing turn the two coloured bands into the green one."),
    ("error", plots.error_against_features, "Error against the number of features",
     "Doubling the features doubles the memory. Where a curve is flat they buy nothing; where it lies far above the "
     "dashed bound a better proposal would help; where the bound itself is above 1 only a colder kernel, an exact "
     "window or training can."),
    ("mass", plots.mass_split, "Where softmax looks",
     "Only the orange share is the features' work. A layer without orange loses nothing by linear attention."),
    ("predicted", plots.predicted_against_measured, "Predicted against measured",
     "The theory's numbers need no features. On the dashed line prediction and measurement agree."),
    ("scale", plots.error_against_scale, "How cold?",
     "A colder kernel (smaller scale) is biased and far less noisy: too warm is noise, too cold is bias. The lowest "
     "point is where calibration starts each head; the prediction draws no features."),
)  # fmt: skip


def _cells(row: Mapping[str, Any], m: str, window: str) -> tuple[str, ...]:
    return (
        str(row["layer"]), str(row["head"]), f"{row['key']['effective_rank']:.1f}",
        f"{row['log_moment']['performer']['predicted']:.1f}", f"{row['log_moment']['balanced']['predicted']:.1f}",
        f"{row['mass']['far']:.0%}", f"{row['error']['balanced'][m]:.2f}", f"{row['default_error'][window][m]:.3f}",
        f"{row['exact_part_error'][window]:.3f}", _factor(row["optimality"]["log_times_bound"]["isotropic"]),
        row["optimality"]["helps"],
    )  # fmt: skip


def _factor(log: float) -> str:
    """exp(log) in few characters, if need be as a power of ten."""
    return f"{math.exp(log):.2g}" if log < math.log(100) else f"1e{log / math.log(10):.0f}"


def ranked(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Measured heads, worst first, by the error of the default form."""
    m, window = str(record["config"]["num_features"]), str(record["config"]["window"])
    return sorted(measured_rows(record["rows"]), key=lambda row: -row["default_error"][window][m])


def advice(record: Mapping[str, Any]) -> list[str]:
    """The recommendations in words, with the numbers behind them."""
    if "recommendations" not in record:
        return ["No head could be measured, so there is nothing to recommend."]
    told = record["recommendations"]
    m, windows = told["num_features"], told["window"]["mean_error"]
    layers = told["exact_layers"]["choice"]
    flags = f"--features {m['choice']} --window {told['window']['choice']}"
    errors = ", ".join(f"{w}: {e:.3f}" for w, e in windows.items())
    estimators = told["estimator"]["mean_error"]
    best = told["estimator"]["choice"]
    rho = record["agreement"]
    return [
        *_needed(record),
        _bounded(record),
        f"Try {flags}: with m = {m['choice']} the mean error is within 5 % of that with "
        f"{max(map(int, m['mean_error']))}; mean error by window {errors} "
        f"(on {record['effort']['tokens']} tokens; longer texts have more beyond a window).",
        f"Least error of features alone at m = {record['config']['num_features']}: {record['estimators'][best]} "
        f"({estimators[best]:.2f}; Performer {estimators['performer']:.2f}).",
        f"Layers to leave exact first ({told['exact_layers']['share']:.0%} of them): "
        f"{', '.join(map(str, layers)) or 'none'}.",
        f"Rank correlation over heads, predicted with measured error: default {rho['default']['rank']['best']:.2f}, "
        f"features alone {rho['features']['rank']['best']:.2f} at each head's best scale and {rho['output']:.2f} at "
        f"scale 1. Taking the predicted scale costs {rho['default']['cost'] - 1:.1%} of the error.",
    ]


def _bounded(record: Mapping[str, Any]) -> str:
    """How far the features are from the best draws, and what follows for how many heads."""
    m, counts = record["config"]["num_features"], record["recommendations"]["helps"]
    found = [row["optimality"] for row in measured_rows(record["rows"])]
    own, best = (median(row["log_times_bound"][name] for row in found) for name in ("isotropic", "optimal"))
    least = median(row["log_least"] for row in found)
    parts = "; ".join(f"{count} heads: {HELPS[name]}" for name, count in counts.items() if count)
    return (
        f"Features' kernel at each head's scale, median: squared error {_factor(own)} × the least that any {m} draws "
        f"can have (optimal Gaussian proposal {_factor(best)} ×); the least is {_factor(least - math.log(m))} × the "
        f"kernel's mean square. What helps: {parts}."
    )


def _needed(record: Mapping[str, Any]) -> list[str]:
    """What a budget would keep exact, and why."""
    if "needs" not in record:
        return []
    found, choice = record["needs"]["sensitivity"], record["needs"]["choice"]
    if choice is None:
        return [f"No heads were chosen: {record['needs']['problem']}"]
    rows = {f"{row['layer']}.{row['head']}": row for row in found["rows"]}
    names = [f"{layer}.{head}" for layer, head in found["order"]]
    kept = [name for name in names if name in choice["config"]["keep_exact"]]
    told = []
    for name in kept[:SHOWN]:
        recall = "" if rows[name]["recall"] is None else f", recall {rows[name]['recall']:.2f}"
        told.append(f"{name} (text {rows[name]['text']:.3f}{recall})")
    more = f" and {len(kept) - SHOWN} more" if len(kept) > SHOWN else ""
    rest = [rows[name]["text"] for name in names if name not in kept]
    return [
        f"A budget of {record['needs']['budget']} keeps softmax in {len(kept)} of {len(names)} heads, window "
        f"{choice['config']['window']} in the others: {', '.join(told) or 'none'}{more}. Numbers are nats a token lost "
        f"when the head sees {found['window']} keys and {found['sinks']} sinks at {found['context']:,} tokens; the "
        f"other heads' median is {median(rest) if rest else 0.0:.4f}. "
        f"`darkformer linearize --budget {record['needs']['asked']}` does that; `darkformer budget` shows what other "
        "budgets buy."
    ]


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """What one diagnosis found, in a few numbers."""
    good, m, window = ranked(record), str(record["config"]["num_features"]), str(record["config"]["window"])
    rho = record["agreement"]
    return {
        "key/value heads": str(len(good)),
        "heads that violate Theorem 3.2, balanced": str(sum(row["inadmissible"] > 0 for row in good)),
        "effective rank of keys, mean": f"{fmean(r['key']['effective_rank'] for r in good):.0f}",
        "attention beyond window and sinks": f"{fmean(r['mass']['far'] for r in good):.0%}",
        f"draws of {m} that carry a query, features alone (median)": f"{_median(good, 'effective'):.1f}",
        "log second moment, Performer, nats (median)": f"{_moment(good, 'performer'):.0f}",
        "the same, centred and balanced": f"{_moment(good, 'balanced'):.0f}",
        "error, window and sinks without features": f"{fmean(r['exact_part_error'][window] for r in good):.3f}",
        "error, default form": f"{fmean(r['default_error'][window][m] for r in good):.3f}",
        "rank correlation of predicted with measured error: default form": f"{rho['default']['rank']['best']:.2f}",
        "… features alone, best scale": f"{rho['features']['rank']['best']:.2f}",
        "… features alone, scale 1": f"{rho['output']:.2f}",
        "cost of the scale that moments choose, default form": f"{rho['default']['moments_cost'] - 1:.1%}",
        "layers to leave exact first": ", ".join(map(str, record["recommendations"]["exact_layers"]["choice"])),
    }


def comparison(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table of diagnoses side by side. `records`: the model's title → record, as read from its file."""
    facts = [_facts(record) for record in records.values()]
    head = ["| | " + " | ".join(records) + " |", "|---|" + "---:|" * len(records)]
    return "\n".join([*head, *(f"| {name} | {' | '.join(f[name] for f in facts)} |" for name in facts[0])])


def _median(rows: Sequence[Mapping[str, Any]], field: str) -> float:
    return median(row[field] for row in rows)


def _moment(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return median(row["log_moment"][name]["predicted"] for row in rows)


def print_diagnosis(record: Mapping[str, Any], console: Console) -> None:
    """Worst and best heads, what could not be measured, and the advice."""
    record = json.loads(json.dumps(record))  # as it stands in the file: keys are strings
    rows, m, window = ranked(record), str(record["config"]["num_features"]), str(record["config"]["window"])
    table = Table(
        title=Text(printable(f"{record['model']}: worst and best heads")), box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for name in COLUMNS:
        table.add_column(name, justify="right")
    shown = rows if len(rows) <= 2 * SHOWN else [*rows[:SHOWN], *rows[-SHOWN:]]
    for i, row in enumerate(shown):
        table.add_row(*_cells(row, m, window), end_section=len(rows) > 2 * SHOWN and i == SHOWN - 1)
    console.print(table)
    console.print(
        "rank: effective rank of the keys; nats, bal.: log second moment of a draw, Performer's and once centred "
        f"and balancing; far: attention beyond window {window} and sinks; alone, default, exact: error of the "
        f"output at m = {m} by features alone (centred, balanced), both parts, window and sinks alone; ×bound: "
        "squared error of the features' kernel at the head's best scale over the least that any draws can have; helps: "
        "what lowers it.",
        style="dim",
        markup=False,
    )
    for problem in record["problems"]:
        console.print(f"not measured: {problem}", style="yellow", markup=False)
    for line in advice(record):
        console.print(line, markup=False)


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>darkformer diagnosis</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}
img{max-width:100%}pre{white-space:pre-wrap;background:#f6f6f6;padding:1rem}</style></head><body>
<h1>{{ record.model }}: what its heads do</h1>
<ul>{% for line in advice %}<li>{{ line }}</li>{% endfor %}</ul>
{% if record.problems %}<h2>Not measured</h2><ul>{% for line in record.problems %}<li>{{ line }}</li>{% endfor %}</ul>
{% endif %}
{% for title, text, image in figures %}<h2>{{ title }}</h2><p>{{ text }}</p>
<img alt="{{ title }}" src="data:image/png;base64,{{ image }}">{% endfor %}
<h2>All heads, worst first</h2>
<table><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<h2>Record</h2><pre>{{ record.environment | tojson(indent=1) }}</pre><pre>{{ record.config | tojson(indent=1) }}</pre>
</body></html>
"""


def write_diagnosis(record: Mapping[str, Any], out: Path) -> Path:
    """Pictures under `out/plots` and `out/report.html`, which holds them all. Returns the page."""
    record = json.loads(json.dumps(record))  # as it stands in the file: keys are strings
    m, window = str(record["config"]["num_features"]), str(record["config"]["window"])
    figures = []
    for name, draw, title, text in PICTURES if "agreement" in record else ():
        path = draw(record, out / "plots" / f"{name}.png")
        figures.append((title, text, base64.b64encode(path.read_bytes()).decode()))
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    target = out / "report.html"
    rows = [_cells(row, m, window) for row in ranked(record)]
    text = page.render(record=record, advice=advice(record), figures=figures, columns=COLUMNS, rows=rows)
    write_text(target, printable(text))
    return target
