"""Tables and the picture of `reproduce width`, from its record alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ...errors import InputError
from ...plots import COLORS, _save
from ..reproduce.records import read_lines
from ..reproduce.session import table_markdown
from .convergence import OPTIMIZERS
from .plan import MODELS
from .verdicts import Lines, claim_table, score_table, scores, settings, slope_table, slopes

#: File and section in the docs → the table, header first, from the record's lines.
TABLES = {"width-claims": claim_table, "width-scores": score_table, "width-slopes": slope_table}


def record_file(out: Path) -> Path:
    """The record that everything is drawn from."""
    return out / "records" / "width.jsonl"


def draw(out: Path) -> dict[str, list[list[str]]]:
    """Draws `plots/width.png` and writes `tables/*.md` from the record in `out`. Returns the tables.

    Raises:
        InputError: no record.
    """
    lines = read_lines(record_file(out))
    if not lines:
        raise InputError(f"{record_file(out)}: no record to draw from. Run `darkformer reproduce width` first.")
    tables = {name: table(lines) for name, table in TABLES.items()}
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (out / "tables" / f"{name}.md").write_text(table_markdown(rows), encoding="utf-8")
    _picture(lines, out / "plots" / "width.png")
    return tables


def _picture(lines: Lines, path: Path) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.8), constrained_layout=True, width_ratios=(2, 1))
    _draw_scores(left, lines)
    _draw_distances(right, lines)
    return _save(figure, path)


def _draw_scores(axes: Any, lines: Lines) -> None:
    """A group of bars a setting; a dot for each seed."""
    every, width = settings(lines), 0.8 / len(MODELS)
    for i, (color, (model, title)) in enumerate(zip(COLORS[1:], MODELS.items(), strict=False)):
        for j, setting in enumerate(every):
            values = [100 * v for v in scores(lines, setting, model).values() if v is not None]
            if values:
                at = j + (i - (len(MODELS) - 1) / 2) * width
                label = title if j == 0 else None
                axes.bar(at, statistics.fmean(values), 0.92 * width, color=color, label=label)
                axes.plot([at] * len(values), values, ".", color="black", markersize=3)
    axes.set_xticks(range(len(every)), [f"{s.name}\n{'R²' if s.task == 'sparse' else 'accuracy'}, %" for s in every])
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.set_title("inputs not trained on", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _draw_distances(axes: Any, lines: Lines) -> None:
    styles: Sequence[tuple[int, str]] = ((1, "-"), (2, "--"))
    for depth, style in styles:
        for color, (name, title) in zip(COLORS[2::2], OPTIMIZERS.items(), strict=False):
            if (found := slopes(lines).get((depth, name))) is not None:
                by, power = found
                label = f"{title},\n{depth} hidden: width^{power:.2f}"
                axes.plot(list(by), list(by.values()), marker="o", linestyle=style, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("width of the finite network")
    axes.set_title("relative distance to the limit", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
