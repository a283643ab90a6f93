"""Figures of a diagnosis, from its record only. Every function skips heads that could not be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import COLORS, _save, plt

Rows = Sequence[Mapping[str, Any]]


def _good(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in record["rows"] if row["problem"] is None]


def _grid(rows: Rows, value: Callable[[Mapping[str, Any]], float]) -> tuple[Any, list[int]]:
    layers, heads = sorted({r["layer"] for r in rows}), 1 + max(r["head"] for r in rows)
    grid = np.full((heads, len(layers)), np.nan)
    for row in rows:
        if row["problem"] is None:
            grid[row["head"], layers.index(row["layer"])] = value(row)
    return grid, layers


def head_maps(record: Mapping[str, Any], path: Path) -> Path:
    """Layer × head: how anisotropic, how noisy, how far the attention reaches, and the error that results."""
    m, window = str(record["config"]["num_features"]), str(record["config"]["window"])
    panels: list[tuple[str, str, Callable[[Mapping[str, Any]], float]]] = [
        ("effective rank of the keys (low: anisotropic)", "directions", lambda r: r["key"]["effective_rank"]),
        ("log second moment, Performer", "nats", lambda r: r["log_moment"]["performer"]["predicted"]),
        ("the same, centred and balanced", "nats", lambda r: r["log_moment"]["balanced"]["predicted"]),
        ("softmax attention beyond window and sinks", "share", lambda r: r["mass"]["far"]),
        (f"error, features alone, m = {m}", "relative", lambda r: r["error"]["balanced"][m]),
        (f"error, window {window} + sinks + features, m = {m}", "relative", lambda r: r["default_error"][window][m]),
    ]  # fmt: skip
    if "needs" in record:
        found = {(row["layer"], row["head"]): row for row in record["needs"]["sensitivity"]["rows"]}
        for name, what in (("text", "text"), ("recall", "numbers told long ago")):
            if any(row[name] is not None for row in found.values()):
                value = lambda r, name=name: found.get((r["layer"], r["head"]), {}).get(name, np.nan)  # noqa: E731
                panels.append((f"lost without its far field: {what}", "nats a token", value))
    grids = [_grid(record["rows"], value) for *_, value in panels]
    layers = grids[0][1]
    height, lines = 1.0 + 0.16 * grids[0][0].shape[0], (len(panels) + 1) // 2
    size = (max(10.0, 0.5 * len(layers)), lines * height + 1.5)
    figure, axes = plt.subplots(lines, 2, figsize=size, constrained_layout=True)
    for unused in axes.flat[len(panels) :]:
        unused.set_axis_off()
    for ax, (title, unit, _), (grid, _) in zip(axes.flat, panels, grids, strict=False):
        colors = plt.get_cmap("viridis").with_extremes(bad="lightgray")
        image = ax.imshow(grid, aspect="auto", cmap=colors, vmin=0)
        ax.set_title(title, fontsize=10)
        step = max(1, len(layers) // 15)
        ax.set_xticks(range(0, len(layers), step), layers[::step])
        ax.set_yticks(range(grid.shape[0]))
        ax.set_ylabel("kv head")
        figure.colorbar(image, ax=ax, label=unit)
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    return _save(figure, path)


def spectra(record: Mapping[str, Any], path: Path) -> Path:
    """Eigenvalues of queries, keys and balanced inputs: median over heads with the 10th and 90th percentile."""
    rows = _good(record)
    figure, axes = plt.subplots(figsize=(8, 4.6), constrained_layout=True)
    names = {"query": "queries", "key": "keys", "balanced": "both, centred and balanced"}
    for color, (field, title) in zip(("#0072b2", "#d55e00", "#009e73"), names.items(), strict=True):
        values = np.clip(np.array([r[field]["eigenvalues"] for r in rows]), 1e-6, None)
        low, middle, high = np.percentile(values, (10, 50, 90), axis=0)
        at = np.arange(1, values.shape[1] + 1)
        axes.plot(at, middle, color=color, label=title)
        axes.fill_between(at, low, high, color=color, alpha=0.15)
    axes.axhline(0.5, color="black", linestyle="--", linewidth=1, label="½: above it Theorem 3.2 has no proposal")
    axes.axhline(
        1 / 6, color="black", linestyle=":", linewidth=1, label="1/6: above it isotropic draws' variance is infinite"
    )
    axes.set_yscale("log")
    axes.set_xlabel("direction, by variance")
    axes.set_ylabel("variance along it (√s·q, √s·k)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def error_against_features(record: Mapping[str, Any], path: Path) -> Path:
    """Mean relative error of the attention output against m, features alone and the default form, with the bound."""
    rows, window = _good(record), str(record["config"]["window"])
    figure, axes = plt.subplots(figsize=(9, 5), constrained_layout=True)
    counts = list(rows[0]["error"]["balanced"])
    at = [int(c) for c in counts]
    for color, (name, title) in zip(COLORS[1:], record["estimators"].items(), strict=False):
        axes.plot(
            at, [np.mean([r["error"][name][c] for r in rows]) for c in counts], marker="o", color=color, label=title
        )
    own = list(rows[0]["default_error"][window])
    both = [np.mean([r["default_error"][window][c] for r in rows]) for c in own]
    axes.plot(
        [int(c) for c in own], both, marker="s", color="#000000", linewidth=2.5, label="default: window, sinks, cold"
    )
    alone = float(np.mean([r["exact_part_error"][window] for r in rows]))
    axes.axhline(alone, color="#000000", linestyle=":", label="window and sinks, no features")
    bound = np.median([r["bound"] for r in rows])
    axes.plot(
        at, [bound / c**0.5 for c in at], color="#f0027f", linestyle="--", label="first-order bound (median head)"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(top=3)
    axes.set_xlabel("random features m")
    axes.set_ylabel("relative error of the attention output\n(1: as wrong as no answer)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return _save(figure, path)


def mass_split(record: Mapping[str, Any], path: Path) -> Path:
    """Where softmax looks: shares of attention on sinks, window and far keys, mean over the heads of each layer."""
    rows = _good(record)
    layers = sorted({r["layer"] for r in rows})
    figure, axes = plt.subplots(figsize=(max(7.0, 0.3 * len(layers) + 2), 3.6), constrained_layout=True)
    bottom = np.zeros(len(layers))
    names = {
        "sinks": f"first {record['config']['sinks']} tokens (sinks)",
        "window": f"last {record['config']['window']} tokens (window)",
        "far": "everything between: the features' part",
    }
    for color, (part, title) in zip(("#999999", "#0072b2", "#d55e00"), names.items(), strict=True):
        share = np.array([np.mean([r["mass"][part] for r in rows if r["layer"] == layer]) for layer in layers])
        axes.bar(range(len(layers)), share, bottom=bottom, color=color, label=title)
        bottom += share
    axes.set_xticks(range(len(layers)), layers, fontsize=8)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of attention")
    axes.set_ylim(0, 1)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9)
    return _save(figure, path)


def predicted_against_measured(record: Mapping[str, Any], path: Path) -> Path:
    """One point a head: second moments, features alone and the default form at their best scales; colour: the layer."""
    rows, m = _good(record), record["config"]["num_features"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), constrained_layout=True)
    layer, agreement = [r["layer"] for r in rows], record["agreement"]
    moments = [r["log_moment"]["balanced"] for r in rows]
    panels = [
        ([p["cold_predicted"] for p in moments], [p["cold_measured"] for p in moments],
         "log second moment, cold inputs (nats)", agreement["moment:balanced"]),
    ]  # fmt: skip
    for form, title in (("features", "features alone"), ("default", "default form")):
        found = [r["by_scale"][form] for r in rows]
        best = [int(np.argmin(f["measured"])) for f in found]
        pair = [[f[side][i] for f, i in zip(found, best, strict=True)] for side in ("predicted", "measured")]
        panels.append((*pair, f"error, {title}, m = {m}, best scale", agreement[form]["rank"]["best"]))
    for ax, (x, y, title, rho) in zip(axes, panels, strict=True):
        points = ax.scatter(x, y, c=layer, cmap="viridis", s=22)
        low, high = min(*x, *y), max(*x, *y)
        ax.plot([low, high], [low, high], color="black", linewidth=1, linestyle="--")
        ax.set_xlabel("predicted")
        ax.set_ylabel("measured")
        ax.set_title(f"{title}\nrank correlation {rho:.2f}", fontsize=10)
        ax.grid(alpha=0.3)
    figure.colorbar(points, ax=axes[-1], label="layer")
    return _save(figure, path)


def error_against_scale(record: Mapping[str, Any], path: Path) -> Path:
    """Error against the geometry's scale, measured and predicted: median over heads, 10th to 90th percentile."""
    rows, m = _good(record), record["config"]["num_features"]
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), constrained_layout=True)
    scales = rows[0]["by_scale"]["scales"]
    for ax, (form, title) in zip(axes, {"features": "features alone", "default": "default form"}.items(), strict=True):
        for color, side in (("#d55e00", "measured"), ("#0072b2", "predicted")):
            errors = np.array([r["by_scale"][form][side] for r in rows])
            low, middle, high = np.percentile(errors, (10, 50, 90), axis=0)
            ax.plot(scales, middle, marker="o", color=color, label=side)
            ax.fill_between(scales, low, high, color=color, alpha=0.15)
        ax.set_xlabel("scale of the geometry (1: softmax's own, smaller: colder)")
        ax.set_title(f"{title}, m = {m}", fontsize=10)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the attention output")
    axes[0].legend(frameon=False)
    return _save(figure, path)
