"""Tables and pictures of plans, calibrations and the study; pictures are drawn from records."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ...plots import COLORS, _save
from ...records import write_text
from ..reproduce.session import table_markdown
from .analysis import Analysis, Lines, analyse, best_shapes, errors, verdicts
from .calibration import Calibration, explained, timings
from .estimate import LONGEST, Estimate
from .fit import FITS, roofline_text
from .fit import verdicts as speed_verdicts
from .study import FITTED, HELD_OUT, PAIR, read_study

#: What a fit of time rests on, as tables name it.
TITLES = {
    "copies": "copies", "flops": "FLOPs", "both": "copies and FLOPs",
    "plan": "copies, FLOPs by kind, kernels (`plan`)",
}  # fmt: skip


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def stage_rows(found: Estimate) -> list[list[str]]:
    """Header, a row a stage, and the sum."""
    rows = [["stage", "what", "time"]]
    rows += [[stage.title, stage.detail, _duration(stage.seconds)] for stage in found.stages]
    return [*rows, ["all", "without loading, tokenizing and saving", _duration(found.seconds)]]


def command_of(found: Estimate, model: str) -> str:
    """The run that was planned, as a command line."""
    task, config = found.task, found.config
    words = ["darkformer", "linearize", model, "--context", str(task.sequence), "--seq-len", str(task.sequence)]
    words += ["--batch-size", "1", "--steps", str(task.steps), "--dtype", task.precision]
    words += ["--transfer-steps", str(task.transfer_steps)] if task.transfer_steps else []
    words += ["--budget", task.budget, "--no-frontier"] if task.budget else ["--window", str(config.window)]
    return shlex.join(
        [*words, "--features", str(config.num_features), "--sinks", str(config.sinks), "--out", "runs/planned"]
    )


def estimate_lines(found: Estimate, model: str) -> list[str]:
    """What stands below the table."""
    task, shape = found.task, found.shape
    ratio = found.softmax_step / found.step
    lines = [
        f"A step takes {found.step:.3g} s converted and {found.softmax_step:.3g} s as softmax "
        f"({ratio:.2g} times as fast); {shape.parameters / 1e6:,.0f}M parameters."
    ]
    available = "" if found.available is None else f" of {found.available / 1e9:.0f} GB"
    lines.append(f"Memory while training: {found.memory / 1e9:.1f} GB{available}.")
    if found.available is not None and found.memory > found.available:
        lines.append("That does not fit: give a shorter --context.")
    where = "at no length up to" if found.crossover is None else "from"
    lines.append(
        f"A converted step is faster than softmax {where} {found.crossover or LONGEST:,} tokens a sequence"
        f"{' on' if found.crossover else ''}."
    )
    if config_heads := len(found.config.keep_exact) if task.budget else 0:
        lines.append(
            f"The budget is counted as window {found.config.window} and {config_heads} exact heads; `linearize` "
            "chooses both by measuring."
        )
    if found.fitting is not None:
        fixed = found.seconds - task.steps * found.step
        lines.append(
            f"{task.hours:g} hours hold {found.fitting:,} tokens of training beside {_duration(fixed)} of other stages."
            if found.fitting
            else f"{task.hours:g} hours hold no training: the other stages alone take {_duration(fixed)}."
        )
    return [*lines, command_of(found, model)]


def fit_rows(found: Calibration, dtype: str) -> list[list[str]]:
    """Header and one row a fit of training time."""
    rows = [["time explained by", "R²", "R² held out", "median error held out", "worst"]]
    for name in FITS:
        x = found.steps[dtype][name]
        rows.append([
            TITLES[name], f"{x.r2:.3f}", f"{x.r2_held_out:.3f}", f"{x.median_error:.1%}", f"{x.worst_error:.1%}"
        ])  # fmt: skip
    return rows


def calibration_tables(found: Calibration) -> dict[str, list[list[str]]]:
    """Title → rows: the fits of each precision, and the claims."""
    tables = {}
    for dtype in found.steps:
        tables[f"training steps, {dtype}"] = fit_rows(found, dtype)
        tables[f"claims, {dtype}"] = speed_verdicts(found.steps[dtype])
    return tables


def roofline_lines(found: Calibration) -> list[str]:
    """Why the claims hold or fail here, by precision."""
    return [f"{dtype}: {roofline_text(explained(found, dtype))}" for dtype in found.steps]


def draw_calibration(found: Calibration, path: Path) -> Path:
    """Predicted against measured seconds of a step, one panel a fit, rows by precision; held-out shapes filled."""
    figure, grid = plt.subplots(
        len(found.steps), len(FITS), figsize=(3.6 * len(FITS), 3.5 * len(found.steps)), constrained_layout=True,
        squeeze=False,
    )  # fmt: skip
    for row, (dtype, by_name) in zip(grid, found.steps.items(), strict=True):
        points = timings(found.record["rows"], dtype)
        for axes, (name, x) in zip(row, by_name.items(), strict=True):
            shown = points if name == "plan" else [point for point in points if point.softmax]
            for held_out, color, label in ((False, COLORS[4], "fitted"), (True, COLORS[2], "held out")):
                part = [point for point in shown if point.held_out == held_out]
                axes.scatter(
                    [point.seconds for point in part], [x.seconds(point.totals) for point in part], s=14, color=color,
                    label=label,
                )  # fmt: skip
            _diagonal(axes, f"{dtype}: {TITLES[name].split(',')[0]}", "measured s a step", "predicted", log=True)
    grid.flat[0].legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _diagonal(axes: Any, title: str, x_label: str, y_label: str, *, log: bool) -> None:
    """Equal axes with the line on which a prediction is right."""
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color="#999999", linewidth=1, zorder=0)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)


def draw_study(found: Analysis, path: Path) -> Path:
    """Loss expected from time against the loss reached; seconds of a step; loss against time with the law's curves."""
    figure, (losses, steps, curves) = plt.subplots(1, 3, figsize=(15.5, 4.6), constrained_layout=True)
    colors = {FITTED: COLORS[4], HELD_OUT: COLORS[2], PAIR: COLORS[6]}
    for role, color in colors.items():
        rows = [x for x in found.predictions if x.role == role]
        losses.scatter([x.reached for x in rows], [x.by_time for x in rows], s=18, color=color, label=role)
        steps.scatter([x.step for x in rows], [x.predicted_step for x in rows], s=18, color=color, label=role)
    _diagonal(losses, "final loss, from shape and time alone", "reached, nats a token", "expected", log=False)
    _diagonal(steps, "seconds of a step", "measured", "predicted", log=True)
    sizes = sorted({x.parameters for x in found.predictions if x.role == FITTED})
    for i, size in enumerate(sizes):
        rows = sorted(
            (x for x in found.predictions if x.role == FITTED and x.parameters == size), key=lambda x: x.seconds
        )
        speed = statistics.median(x.tokens / x.seconds for x in rows)
        seconds = np.geomspace(rows[0].seconds / 2, rows[-1].seconds * 2, 40)
        shade = plt.get_cmap("viridis")(i / max(1, len(sizes) - 1))
        curves.plot(seconds, [found.law.loss_in_time(size, t, speed) for t in seconds], color=shade, linewidth=1)
        curves.scatter([x.seconds for x in rows], [x.reached for x in rows], s=18, color=shade,
                       label=f"{size / 1e6:.1f}M")  # fmt: skip
    curves.set_xscale("log")
    curves.set_xlabel("seconds of training")
    curves.set_ylabel("nats a token")
    curves.set_title("loss in time: runs and the law", fontsize=10)
    curves.grid(alpha=0.3)
    for axes in (losses, curves):
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def prediction_rows(found: Analysis) -> list[list[str]]:
    """Header and one row a run that took no part in the fit."""
    rows = [
        ["run", "parameters", "tokens", "seconds", "loss", "expected from time", "from tokens", "s/step", "predicted"]
    ]
    for x in found.predictions:
        if x.role != FITTED:
            rows.append([
                x.run, f"{x.parameters / 1e6:.2f}M", f"{x.tokens:,.0f}", f"{x.seconds:.0f}", f"{x.reached:.3f}",
                f"{x.by_time:.3f}", f"{x.by_tokens:.3f}", f"{x.step:.3f}", f"{x.predicted_step:.3f}",
            ])  # fmt: skip
    return rows


def law_rows(found: Analysis) -> list[list[str]]:
    """Header and the coefficients, with the errors of fitted and held-out runs."""
    law = found.law
    rows = [["E", "A", "α", "B", "β", "median error, fitted", "held out", "held out, from time", "s/step"]]
    cells = []
    for field, role in (("by_tokens", FITTED), ("by_tokens", HELD_OUT), ("by_time", HELD_OUT), ("step", "")):
        values = errors(found.predictions, field, role)
        cells.append(f"{statistics.median(values):.1%}" if values else "–")
    return [*rows, [
        f"{law.irreducible:.3f}", f"{law.parameter_scale:.4g}", f"{law.alpha:.3f}", f"{law.token_scale:.4g}",
        f"{law.beta:.3f}", *cells,
    ]]  # fmt: skip


def pair_rows(found: Analysis) -> list[list[str]]:
    """Header and one row a pair."""
    rows = [["size", "wide", "deep", "steps for one deep", "time, wide / deep", "expected gain", "reached gain"]]
    for x in found.pairs:
        rows.append([
            x.pair, x.wide, x.deep, f"{x.predicted_speed:.2f}", f"{x.seconds:.2f}", f"{x.predicted:+.3f}",
            f"{x.reached:+.3f}",
        ])  # fmt: skip
    return rows


def study_tables(found: Analysis, lines: Lines, calibration: Calibration) -> dict[str, list[list[str]]]:
    """The tables of a study, name → rows."""
    step = lines[0]["batch_size"], lines[0]["seq_len"]
    claims = {dtype: speed_verdicts(x) for dtype, x in calibration.steps.items()}
    speed = {dtype: fit_rows(calibration, dtype) for dtype in calibration.steps}
    return {
        "time-speed": _joined("precision", speed),
        "time-law": law_rows(found),
        "time-predictions": prediction_rows(found),
        "time-pairs": pair_rows(found),
        "time-best": best_shapes(found.law, calibration, step, lines[0]["vocabulary"]),
        "time-claims": [*_joined("of", claims), *(["runs", *row] for row in verdicts(found)[1:])],
    }


def _joined(name: str, tables: Mapping[str, list[list[str]]]) -> list[list[str]]:
    """Tables of one header as one, with a first column that tells them apart."""
    header = next(iter(tables.values()))[0]
    return [[name, *header], *([key, *row] for key, rows in tables.items() for row in rows[1:])]


def write_study(out: Path) -> dict[str, list[list[str]]]:
    """Draws the pictures and writes the tables of the study in `out`, from its records alone; the tables.

    Raises:
        InputError: no records, or too few runs for a law.
    """
    lines, calibration = read_study(out)
    found = analyse(lines)
    tables = study_tables(found, lines, calibration)
    draw_study(found, out / "plots" / "time.png")
    draw_calibration(calibration, out / "plots" / "time-calibration.png")
    for name, rows in tables.items():
        write_text(out / "tables" / f"{name}.md", table_markdown(rows))
    return tables
