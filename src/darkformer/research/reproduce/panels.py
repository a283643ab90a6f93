"""Figures of the reproduction: panels of curves with bands, from numbers that stand in records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

from ...plots import COLORS, _save

#: The methods' own colours, the same in every figure (Okabe and Ito).
METHOD_COLORS = {
    "exact softmax": "#000000", "DARK": "#0072b2", "Performer": "#d55e00", "LFK": "#cc79a7", "random": "#999999",
    "constant": "#e69f00", "ours": "#009e73",
}  # fmt: skip


class Curve(NamedTuple):
    """One line, with the lowest and highest value at each point."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    dashed: bool = False


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False


def _name(curve: Curve) -> str:
    """What a curve is of, without what its title says about it: such curves have one colour in all panels."""
    return curve.title.split(":")[0].split(",")[0]


def _draw(axes: Any, panel: Panel, colors: dict[str, str]) -> None:
    for curve in panel.curves:
        color = colors[_name(curve)]
        style = "--" if curve.dashed else "-"
        axes.plot(curve.x, curve.y, marker="o", markersize=3.5, color=color, linestyle=style, label=curve.title)
        if curve.band is not None:
            axes.fill_between(curve.x, *curve.band, color=color, alpha=0.18, linewidth=0)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(alpha=0.3)
    if panel.curves:
        axes.legend(frameon=False, fontsize=8)


def draw_panels(panels: Sequence[Panel], path: Path) -> Path:
    """Panels side by side; what stands in several has the same colour in all of them."""
    names = dict.fromkeys(_name(curve) for panel in panels for curve in panel.curves)
    colors = {name: METHOD_COLORS.get(name, COLORS[2 + i % 6]) for i, name in enumerate(names)}
    figure, grid = plt.subplots(
        1, len(panels), figsize=(5.6 * len(panels) + 0.6, 4.4), constrained_layout=True, squeeze=False
    )
    for axes, panel in zip(grid.flat, panels, strict=True):
        _draw(axes, panel, colors)
    return _save(figure, path)
