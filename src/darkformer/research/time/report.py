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
from matplotlib.ticker import FuncFormatter

from ...config import NO_BUDGET
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
PANELS = {**TITLES, "plan": "copies, kernels, FLOPs by kind"}


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def stage_rows(planned: Estimate) -> list[list[str]]:
    """Header, a row a stage, and the sum."""
    rows = [["stage", "what", "time"]]
    rows += [[stage.title, stage.detail, _duration(stage.seconds)] for stage in planned.stages]
    return [*rows, ["all", "without loading, tokenizing and saving", _duration(planned.seconds)]]


def command_of(planned: Estimate, model: str) -> str:
    """The run that was planned, as a command line."""
    task, config = planned.task, planned.config
    words = ["darkformer", "linearize", model, "--context", str(task.sequence), "--seq-len", str(task.sequence)]
    words += ["--batch-size", "1", "--steps", str(task.steps), "--dtype", task.precision, "--method", config.method]
    words += ["--features", str(config.num_features), "--sinks", str(config.sinks)]
    words += ["--convert-sliding"] if config.convert_sliding else []
    words += ["--transfer-steps", str(task.transfer_steps)] if task.transfer_steps else []
    words += ["--budget", task.budget]
    if task.budget == NO_BUDGET:
        words += ["--window", str(config.window), *(f"--keep-exact={name}" for name in config.keep_exact)]
    else:
        words += ["--no-frontier"]
    return shlex.join([*words, "--out", "runs/planned"])


def estimate_lines(planned: Estimate, model: str) -> list[str]:
    """What stands below the table."""
    task = planned.task
    available = "" if planned.available is None else f" of {planned.available / 1e9:.0f} GB"
    ratio, parameters = planned.softmax_step / planned.step, planned.shape.parameters
    lines = [
        *planned.notes,
        f"A step takes {planned.step:.3g} s converted and {planned.softmax_step:.3g} s as softmax "
        f"({ratio:.2g} times as fast); {parameters / 1e6:,.1f}M parameters.",
        f"Memory while training: {planned.memory / 1e9:.1f} GB{available}.",
    ]
    if planned.available is not None and planned.memory > planned.available:
        lines.append("That does not fit: give a shorter --context.")
    if planned.crossover is None:
        lines.append(f"A converted step is slower than softmax at every length up to {LONGEST:,} tokens.")
    else:
        lines.append(f"A converted step is faster than softmax from {planned.crossover:,} tokens a sequence on.")
    if task.budget != NO_BUDGET:
        window, heads = planned.config.window, len(planned.config.keep_exact)
        lines.append(
            f"The budget of {task.budget} is counted as window {window} and {heads} exact heads; `linearize` chooses "
            "both by measuring."
        )
    if planned.fitting is not None:
        rest = _duration(planned.seconds - task.steps * planned.step)
        lines.append(f"{task.hours:g} hours hold {planned.fitting:,} tokens of training; all other stages take {rest}.")
    return [*lines, command_of(planned, model)]


def fit_rows(calibration: Calibration, dtype: str) -> list[list[str]]:
    """Header and one row a fit of training time."""
    rows = [["time explained by", "R²", "R² held out", "median error held out", "worst"]]
    for name in FITS:
        x = calibration.steps[dtype][name]
        rows.append([
            TITLES[name], f"{x.r2:.3f}", f"{x.r2_held_out:.3f}", f"{x.median_error:.1%}", f"{x.worst_error:.1%}"
        ])  # fmt: skip
    return rows


def calibration_tables(calibration: Calibration) -> dict[str, list[list[str]]]:
    """Title → rows: the fits of each precision, and the claims."""
    tables = {}
    for dtype in calibration.steps:
        tables[f"training steps, {dtype}"] = fit_rows(calibration, dtype)
        tables[f"claims, {dtype}"] = speed_verdicts(calibration.steps[dtype])
    return tables


def roofline_lines(calibration: Calibration) -> list[str]:
    """Why the claims hold or fail here, by precision."""
    return [f"{dtype}: {roofline_text(explained(calibration, dtype))}" for dtype in calibration.steps]


def draw_calibration(calibration: Calibration, path: Path) -> Path:
    """Predicted against measured seconds of a step, one panel a fit, rows by precision; held-out shapes filled."""
    size = len(calibration.steps), len(FITS)
    figure, grid = plt.subplots(*size, figsize=(3.6 * size[1], 3.5 * size[0]), constrained_layout=True, squeeze=False)
    for row, (dtype, by_name) in zip(grid, calibration.steps.items(), strict=True):
        points = timings(calibration.record["rows"], dtype)
        for axes, (name, x) in zip(row, by_name.items(), strict=True):
            shown = points if name == "plan" else [point for point in points if point.softmax]
            for held_out, color, label in ((False, COLORS[4], "fitted"), (True, COLORS[2], "held out")):
                part = [point for point in shown if point.held_out == held_out]
                axes.scatter(
                    [point.seconds for point in part], [x.seconds(point.totals) for point in part], s=14, color=color,
                    label=label,
                )  # fmt: skip
            _diagonal(axes, f"{dtype}: {PANELS[name]}", "measured s a step", "predicted", log=True)
    grid.flat[0].legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _diagonal(axes: Any, title: str, x_label: str, y_label: str, *, log: bool) -> None:
    """Equal axes with the line on which a prediction is right."""
    if log:
        axes.loglog()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else ""))
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color="#999999", linewidth=1, zorder=0)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)


def draw_study(analysis: Analysis, path: Path) -> Path:
    """Loss expected from time against the loss reached; seconds of a step; loss against time with the law's curves."""
    figure, (losses, steps, curves) = plt.subplots(1, 3, figsize=(15.5, 4.6), constrained_layout=True)
    colors = {FITTED: COLORS[4], HELD_OUT: COLORS[2], PAIR: COLORS[6]}
    for role, color in colors.items():
        rows = [x for x in analysis.predictions if x.role == role]
        losses.scatter([x.reached for x in rows], [x.by_time for x in rows], s=18, color=color, label=role)
        steps.scatter([x.step for x in rows], [x.predicted_step for x in rows], s=18, color=color, label=role)
    _diagonal(losses, "final loss, from shape and time alone", "reached, nats a token", "expected", log=False)
    _diagonal(steps, "seconds of a step", "measured", "predicted", log=True)
    sizes = sorted({x.parameters for x in analysis.predictions if x.role == FITTED})
    for i, size in enumerate(sizes):
        rows = sorted(
            (x for x in analysis.predictions if x.role == FITTED and x.parameters == size), key=lambda x: x.seconds
        )
        speed = statistics.median(x.tokens / x.seconds for x in rows)
        seconds = np.geomspace(rows[0].seconds / 2, rows[-1].seconds * 2, 40)
        shade = plt.get_cmap("viridis")(i / max(1, len(sizes) - 1))
        curves.plot(seconds, [analysis.law.loss_in_time(size, t, speed) for t in seconds], color=shade, linewidth=1)
        curves.scatter([x.seconds for x in rows], [x.reached for x in rows], s=18, color=shade,
                       label=f"{size / 1e6:.1f}M")  # fmt: skip
    curves.set_xscale("log")
    curves.xaxis.set_major_formatter("{x:g}")
    curves.set_xlabel("seconds of training")
    curves.set_ylabel("nats a token")
    curves.set_title("loss in time: runs and the law", fontsize=10)
    curves.grid(alpha=0.3)
    for axes in (losses, curves):
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def prediction_rows(analysis: Analysis) -> list[list[str]]:
    """Header and one row a run that took no part in the fit."""
    rows = [
        ["run", "parameters", "tokens", "seconds", "loss", "expected from time", "from tokens", "s/step", "predicted"]
    ]
    for x in analysis.predictions:
        if x.role != FITTED:
            rows.append([
                x.run, f"{x.parameters / 1e6:.2f}M", f"{x.tokens:,.0f}", f"{x.seconds:.0f}", f"{x.reached:.3f}",
                f"{x.by_time:.3f}", f"{x.by_tokens:.3f}", f"{x.step:.3f}", f"{x.predicted_step:.3f}",
            ])  # fmt: skip
    return rows


def law_rows(analysis: Analysis) -> list[list[str]]:
    """Header and the coefficients, with the errors of fitted and held-out runs."""
    law = analysis.law
    rows = [["E", "A", "α", "B", "β", "median error, fitted", "held out", "held out, from time", "s/step"]]
    cells = []
    for field, role in (("by_tokens", FITTED), ("by_tokens", HELD_OUT), ("by_time", HELD_OUT), ("step", "")):
        values = errors(analysis.predictions, field, role)
        cells.append(f"{statistics.median(values):.1%}" if values else "–")
    return [*rows, [
        f"{law.irreducible:.3f}", f"{law.parameter_scale:.4g}", f"{law.alpha:.3f}", f"{law.token_scale:.4g}",
        f"{law.beta:.3f}", *cells,
    ]]  # fmt: skip


def pair_rows(analysis: Analysis) -> list[list[str]]:
    """Header and one row a pair."""
    rows = [["size", "wide", "deep", "steps for one deep", "time, wide / deep", "expected gain", "reached gain"]]
    for x in analysis.pairs:
        rows.append([
            x.pair, x.wide, x.deep, f"{x.predicted_speed:.2f}", f"{x.seconds:.2f}", f"{x.predicted:+.3f}",
            f"{x.reached:+.3f}",
        ])  # fmt: skip
    return rows


def study_tables(analysis: Analysis, lines: Lines, calibration: Calibration) -> dict[str, list[list[str]]]:
    """The tables of a study, name → rows."""
    step = lines[0]["batch_size"], lines[0]["seq_len"]
    claims = {dtype: speed_verdicts(x) for dtype, x in calibration.steps.items()}
    speed = {dtype: fit_rows(calibration, dtype) for dtype in calibration.steps}
    return {
        "time-speed": _joined("precision", speed),
        "time-law": law_rows(analysis),
        "time-predictions": prediction_rows(analysis),
        "time-pairs": pair_rows(analysis),
        "time-best": best_shapes(analysis.law, calibration, step, lines[0]["vocabulary"]),
        "time-claims": [*_joined("of", claims), *(["runs", *row] for row in verdicts(analysis)[1:])],
    }


def _joined(name: str, tables: Mapping[str, list[list[str]]]) -> list[list[str]]:
    """Tables of one header as one, with a first column that names them."""
    header = next(iter(tables.values()))[0]
    return [[name, *header], *([key, *row] for key, rows in tables.items() for row in rows[1:])]


def write_study(out: Path) -> dict[str, list[list[str]]]:
    """Draws the pictures and writes the tables of the study in `out`, from its records alone; the tables.

    Raises:
        InputError: no records, or too few runs for a law.
    """
    lines, calibration = read_study(out)
    analysis = analyse(lines)
    tables = study_tables(analysis, lines, calibration)
    draw_study(analysis, out / "plots" / "time.png")
    draw_calibration(calibration, out / "plots" / "time-calibration.png")
    for name, rows in tables.items():
        write_text(out / "tables" / f"{name}.md", table_markdown(rows))
    return tables
