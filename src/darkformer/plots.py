"""Figures, drawn from records only: dicts and lists as they stand in the JSON files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogFormatter

from .cost import times_as_fast
from .reporting import printable

#: One colour a method, chosen to stay apart for colour-blind readers (Okabe and Ito).
COLORS = ("#000000", "#999999", "#d55e00", "#cc79a7", "#0072b2", "#56b4e9", "#009e73", "#e69f00")


def _name(name: str) -> str:
    """A name as a label: matplotlib would set what stands between two $ as a formula, and drop a name with _ first."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def recall_against_distance(models: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """One line a model: share of numbers recalled against the tokens that lie between, with the windows' ends.

    Args:
        models: name → `recall` (points with `distance` and `accuracy`) and `window` (None for softmax).
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    styles = zip(COLORS[::4] + COLORS[2::4], "osD^", (9, 7, 5, 4), ("-", "--", "-.", ":"), strict=True)
    windows = sorted({row["window"] for row in models.values() if row["window"]})
    for window in windows:
        axes.axvline(window, color="#999999", linewidth=1)
        axes.annotate(f"window {window}", (window, 50), rotation=90, ha="right", va="center", color="#666666")
    for (color, marker, size, line), (name, row) in zip(styles, models.items(), strict=False):
        distances = [point["distance"] for point in row["recall"]]
        values = [100 * point["accuracy"] for point in row["recall"]]
        label = _name(Path(name).name)
        axes.plot(distances, values, marker=marker, markersize=size, linestyle=line, color=color, label=label)
        axes.set_xticks(distances, [str(distance) for distance in distances])
    axes.set_xlabel("tokens between the number and the question's end")
    axes.set_ylabel("numbers recalled whole, %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, path)


def loss_by_position(
    models: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, label: str = "loss, nats a token"
) -> Path:
    """One line a model: loss against the predicted token's position in its sequence, on a logarithmic axis.

    Args:
        models: name → buckets with `start`, `stop` and `loss`, as evaluation scores them.
        label: of the axis of losses.
    """
    figure, axes = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    edges: set[int] = set()
    styles = zip(COLORS[::4] + COLORS[2::4] + COLORS[1::2], "osD^vP*X", 2 * ("-", "--", "-.", ":"), strict=True)
    for (color, marker, line), (name, buckets) in zip(cycle(styles), models.items(), strict=False):
        places = [(bucket["start"] * (bucket["stop"] - 1)) ** 0.5 for bucket in buckets]  # the middle of a bucket
        values = [bucket["loss"] for bucket in buckets]
        axes.plot(places, values, marker=marker, linestyle=line, color=color, label=_name(Path(name).name))
        edges |= {bucket["start"] for bucket in buckets} | {buckets[-1]["stop"]}
    axes.set_xticks(sorted(edges), [f"{edge:,}" for edge in sorted(edges)], rotation=45)
    axes.set_xlabel("position of the predicted token")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, path)


def quality_against_bytes(record: Mapping[str, Any], path: Path) -> Path:
    """Share of softmax's accuracy, and recall, against the bytes one sequence keeps, on a logarithmic axis.

    Softmax is the star at the right end. Rows with a budget are one line, labelled with it; rows without any feature or
    exact head (window and sinks alone) are a second, dashed one; others stand alone. Rows that failed are left out.

    Args:
        record: what `measure_frontier` writes, with a softmax row.
    """
    length = str(record["settings"]["lengths"][0])
    rows = [row for row in record["rows"] if row.get("score") and row.get("bytes")]
    softmax = next(row for row in rows if row["config"] is None)
    reference = softmax["score"]["accuracy"] or 1.0  # a model that knows nothing has no share

    def windows_only(row: Mapping[str, Any]) -> bool:
        return row["config"]["method"] == "local" and not row["config"]["keep_exact"]

    converted = sorted((row for row in rows if row["config"] is not None), key=lambda row: row["bytes"][length])
    lines = {
        "darkformer, by budget": (
            [row for row in converted if row["budget"] and not windows_only(row)],
            "#d55e00",
            "o",
            "-",
        ),
        "window and sinks alone": ([row for row in converted if windows_only(row)], "#0072b2", "s", "--"),
    }
    for color, row in zip(cycle(COLORS[3::2]), converted, strict=False):
        if not row["budget"] and not windows_only(row):
            lines[row["title"]] = ([row], color, "D", "")
    panels: list[tuple[str, Callable[[Mapping[str, Any]], float | None]]] = [
        ("next-token accuracy, % of softmax's", lambda row: 100 * row["score"]["accuracy"] / reference)
    ]
    if softmax.get("recall"):
        distances = ", ".join(f"{point['distance']:,}" for point in softmax["recall"])
        panels.append((f"numbers recalled, %, mean over\n{distances} tokens", _mean_recall))
    figure, grid = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.5), constrained_layout=True, squeeze=False
    )
    for axes, (label, quality) in zip(grid.flat, panels, strict=True):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # 10 and not 10¹
        axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        for name, (members, color, marker, style) in lines.items():
            points = [(row["bytes"][length] / 1e6, quality(row), row["budget"]) for row in members]
            points = [point for point in points if point[1] is not None]
            if not points:
                continue
            xs, ys, budgets = zip(*points, strict=True)
            axes.plot(xs, ys, color=color, marker=marker, linestyle=style, label=_name(name))
            for x, y, budget in zip(xs, ys, map(_name, budgets), strict=True):
                axes.annotate(budget, (x, y), xytext=(0, -13), textcoords="offset points", ha="center", fontsize=8)
        if (end := quality(softmax)) is not None:
            axes.plot(softmax["bytes"][length] / 1e6, end, "k*", markersize=12, label="softmax")
            axes.axhline(end, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"MB one sequence of {int(length):,} tokens keeps")
        axes.set_ylabel(label)
        axes.margins(0.08, 0.12)
        axes.grid(alpha=0.3)
    grid.flat[0].legend(loc="lower right", frameon=False)
    return _save(figure, path)


def _mean_recall(row: Mapping[str, Any]) -> float | None:
    """Percent of whole numbers, the mean over the distances; None where it was not measured."""
    points = row.get("recall")
    return 100 * sum(point["accuracy"] for point in points) / len(points) if points else None


def error_heat_map(choices: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Relative error of the attention output per layer and kv head: exact part only, and with features.

    Args:
        choices: calibration records with `layer`, `error` and `error_exact_part`.
    """
    both = np.array([c["error"] for c in choices]).T
    alone = np.array([c["error_exact_part"] for c in choices]).T
    layers = [c["layer"] for c in choices]
    high = float(max(both.max(), alone.max()))
    figure, rows = plt.subplots(2, 1, figsize=(max(7.0, 0.34 * len(layers) + 2), 4.4), constrained_layout=True)
    for axes, values, title in zip(rows, (alone, both), ("window and sinks only", "with random features"), strict=True):
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=high)
        axes.set_title(f"{title} (mean {values.mean():.2f})", fontsize=10)
        axes.set_xticks(range(0, len(layers), 2), layers[::2])
        axes.set_yticks(range(values.shape[0]))
        axes.set_ylabel("kv head")
    rows[-1].set_xlabel("layer")
    figure.colorbar(image, ax=rows, label="relative error of the output\nafter calibration, no training")
    return _save(figure, path)


def _curves(record: Mapping[str, Any]) -> dict[tuple[str, str], dict[tuple[str, int], list[Mapping[str, Any]]]]:
    """(dtype, direction) → (path, window) → rows by length, of the shape measured at most lengths."""
    points = record["points"]
    names = [row["shape"]["name"] for row in points]
    main = max(set(names), key=lambda name: len({r["length"] for r in points if r["shape"]["name"] == name}))
    panels: dict[tuple[str, str], dict[tuple[str, int], list[Mapping[str, Any]]]] = {}
    for row in sorted(points, key=lambda row: row["length"]):
        if row["shape"]["name"] == main:
            panel = panels.setdefault((row["dtype"], row["direction"]), {})
            panel.setdefault((row["path"], row["shape"]["window"]), []).append(row)
    return panels


def _panels(record: Mapping[str, Any]) -> tuple[Any, list[tuple[Any, tuple[str, str], dict[Any, Any]]]]:
    curves = _curves(record)
    columns = 2 if len(curves) > 1 else 1
    height = -(-len(curves) // columns)
    figure, grid = plt.subplots(
        height, columns, figsize=(6 * columns, 4 * height), constrained_layout=True, squeeze=False
    )
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    found = list(zip(grid.flat, curves, curves.values(), strict=False))
    for axes, (dtype, direction), _ in found:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_title(f"{direction}, {dtype}", fontsize=10)
        axes.grid(alpha=0.3)
    return figure, found


def _label(path: str, window: int) -> str:
    return "softmax (torch)" if path == "sdpa" else f"{path}, window {window}"


def time_against_length(record: Mapping[str, Any], path: Path) -> Path:
    """Seconds of every path against tokens, log-log, with each linear path's lower bound dotted in its colour.

    Args:
        record: what `darkformer bench` writes.
    """
    figure, panels = _panels(record)
    for axes, _, curves in panels:
        for color, ((name, window), rows) in zip(COLORS, curves.items(), strict=False):
            lengths = [row["length"] for row in rows]
            axes.plot(lengths, [row["median"] for row in rows], marker="o", color=color, label=_label(name, window))
            if name in ("chunked", "native"):
                axes.plot(lengths, [row["bound_seconds"] for row in rows], linestyle=":", color=color)
        axes.set_ylabel("seconds (dotted: lower bound)")
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def speed_up_against_length(record: Mapping[str, Any], path: Path) -> Path:
    """Speed-up over torch's softmax against tokens, log-log; a vertical line where a path crosses 1.

    Args:
        record: what `darkformer bench` writes, with its `crossover`.
    """
    figure, panels = _panels(record)
    for axes, (dtype, direction), curves in panels:
        softmax = {row["length"]: row for row in curves.get(("sdpa", 0), [])}
        for color, ((name, window), rows) in zip(COLORS, curves.items(), strict=False):
            kept = [row for row in rows if name != "sdpa" and row["length"] in softmax]
            if not kept:
                continue
            gains = [times_as_fast(row, softmax[row["length"]]) for row in kept]
            axes.plot([row["length"] for row in kept], gains, marker="o", color=color, label=_label(name, window))
            same = {"dtype": dtype, "direction": direction, "path": name, "shape": kept[0]["shape"]}
            for crossing in record.get("crossover", []):
                if crossing["tokens"] and all(crossing[key] == value for key, value in same.items()):
                    axes.axvline(crossing["tokens"], color=color, linewidth=1, linestyle="--")
        axes.axhline(1, color="black", linewidth=1)
        axes.set_ylabel("times as fast as softmax (dashed: crossover)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
