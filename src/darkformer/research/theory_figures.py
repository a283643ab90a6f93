"""The statements of docs/theory.md as six panels, from the record of benchmarks/theory.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import COLORS, _save, plt

BLACK, GREY, ORANGE, PINK, BLUE, SKY, GREEN, YELLOW = COLORS
Record = Mapping[str, Any]


def _unbiased(ax: Any, record: Record) -> None:
    rows = record["unbiasedness"]
    m = [r["m"] for r in rows]
    ax.plot(m, [r["predicted"] for r in rows], color=BLACK, linestyle="--", label="formula √((e^L − 1)/m)")
    ax.plot(m, [r["measured"] for r in rows], "o", color=ORANGE, label="root mean square error")
    ax.errorbar(
        m, [abs(r["bias"]) for r in rows], yerr=[2 * r["standard_error"] for r in rows], fmt="s", color=BLUE,
        label="|mean error| ± 2 s.e.: no bias",
    )  # fmt: skip
    ax.set(title="a  Lemma 2.1: unbiased", xlabel="draws m", ylabel="relative error", xscale="log", yscale="log")
    ax.set_ylim(bottom=1e-4)


def _perturbed(ax: Any, record: Record) -> None:
    for color, row in zip((SKY, BLUE), record["perturbations"], strict=True):
        ax.plot(100 * np.array(row["excess"]), color=color, label=f"distance {row['size']} from Σ*")
    ax.set(
        title="b  Theorem 3.2: every other Σ is worse", xlabel="random direction, sorted",
        ylabel="excess of the second moment, %",
    )  # fmt: skip
    ax.set_ylim(bottom=0)


def _importance(ax: Any, record: Record) -> None:
    rows = record["importance"]
    for color, name, title in ((ORANGE, "sampled", "ω ~ N(0, Σ)"), (BLUE, "weighted", "isotropic ω, weighted")):
        ax.plot(
            [r[f"{name}_predicted"] for r in rows], [r[f"{name}_measured"] for r in rows], "o", markersize=4,
            color=color, label=title,
        )  # fmt: skip
    variances = [value for row in rows for value in row.values()]
    low, high = min(variances), max(variances)
    ax.plot([low, high], [low, high], color=BLACK, linewidth=1, linestyle="--")
    ax.set(
        title="c  Proposition 4.1: one mean, two variances", xlabel="relative variance, formula", ylabel="measured",
        xscale="log", yscale="log",
    )  # fmt: skip


def _moments(ax: Any, record: Record) -> None:
    rows = record["moments"]
    titles = {"isotropic": "isotropic", "oprf": "OPRF", "optimal": "optimal Gaussian", "theorem32": "Theorem 3.2"}
    for color, (name, title) in zip((GREY, SKY, GREEN, ORANGE), titles.items(), strict=True):
        there = [r for r in rows if name in r]
        ax.plot([r["lambda"] for r in there], [r[name] for r in there], color=color, label=title)
    ax.axvline(0.5, color=BLACK, linewidth=1, linestyle="--")
    ax.set(title="d  Which proposal, and where it exists", xlabel="largest eigenvalue λ of Λ", ylabel="E[L], nats")
    ax.set_ylim(0, 1.05 * max(r["oprf"] for r in rows))


def _equivalence(ax: Any, record: Record) -> None:
    rows = record["equivalence"]
    styles = {"positive": (ORANGE, "o"), "trigonometric": (BLUE, "s")}
    for name, (color, marker) in styles.items():
        for way, line in (("optimal", "-"), ("naive", ":")):
            label = f"{name}_{way}"
            ax.errorbar(
                [r["scale"] for r in rows], [r[label] for r in rows], color=color, marker=marker, linestyle=line,
                yerr=[2 * r[f"{label}_standard_error"] for r in rows],
                label=f"{name}, {'optimal draws' if way == 'optimal' else 'N(0, I)'}",
            )  # fmt: skip
    ax.axhline(1, color=BLACK, linewidth=1, linestyle="--")
    ax.set(title="e  No representation beats the bound", xlabel="scale of the data", ylabel="m · error / bound")
    ax.set_yscale("log")
    ax.set_ylim(0.8, 100)  # beyond it the mean over draws is carried by a few of them


def _colder(ax: Any, record: Record) -> None:
    rows = record["colder"]
    scales = [r["scale"] for r in rows]
    for color, name, title in (
        (GREY, "bias", "bias alone"), (BLUE, "typical", "bias + typical noise"),
        (SKY, "first_order", "bias + first-order noise"),
    ):  # fmt: skip
        ax.plot(scales, [r[name] for r in rows], color=color, label=title)
    ax.errorbar(
        scales, [r["measured"] for r in rows], yerr=[2 * r["standard_error"] for r in rows], fmt="o", color=ORANGE,
        label="measured",
    )  # fmt: skip
    ax.set(title="f  Start cold (m = 64)", xlabel="scale of the geometry", ylabel="squared error of the output")
    ax.set_ylim(0, 2 * max(r["measured"] for r in rows))


def theory_panels(record: Record, path: Path) -> Path:
    """All six, formula against draws."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), constrained_layout=True)
    panels = (_unbiased, _perturbed, _importance, _moments, _equivalence, _colder)
    for ax, panel in zip(axes.flat, panels, strict=True):
        panel(ax, record)
        ax.title.set_fontsize(11)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
    return _save(figure, path)
