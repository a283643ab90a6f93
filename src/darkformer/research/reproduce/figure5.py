"""Figure 5: stability over seven learning rates, DARK against Performer: the band of the loss, and its spikes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .panels import Curve, Panel, draw_panels
from .plan import METHODS, Experiment

FIGURES = ("5",)
QUESTION = "At which learning rates does training stay stable?"
#: A spike begins where a step's training loss is more than `SPIKE` nats above the median of the `BEFORE` steps before,
#: and ends where it no longer is; a run of such steps counts once.
SPIKE, BEFORE = 1.0, 20
TWO = ("dark", "performer")
RATES = (3e-4, 6.5e-4, 1.4e-3, 3e-3, 6.5e-3, 1.4e-2, 3e-2)

GROWN = Experiment("5", "grown", TWO, 160, RATES, every_rate=True, seeds=(0, 1), points=3, mechanism=True)
FULL = Experiment(
    "5", "gemma", TWO, 2000, tuple(r / 100 for r in RATES), every_rate=True, seeds=(0, 1), points=10, mechanism=True
)


def spikes(losses: Sequence[float]) -> int:
    """How many spikes, as defined above, a run's training losses have.

    >>> spikes([3.0] * 30 + [5.0, 5.2] + [3.0] * 10 + [4.5])
    2
    """
    high = [
        losses[i] > statistics.median(losses[i - BEFORE : i]) + SPIKE for i in range(BEFORE, len(losses))
    ]  # fmt: skip
    return sum(now and not before for before, now in zip([False, *high], high, strict=False))


def runs(lines: Sequence[Mapping[str, Any]], method: str, rate: float | None = None) -> list[Mapping[str, Any]]:
    """The run lines of a method, at one rate or all."""
    return [
        line for line in lines
        if line["kind"] == "run" and line["method"] == method and (rate is None or line["lr"] == rate)
    ]  # fmt: skip


def rates(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Rates in the record, ascending."""
    return sorted({line["lr"] for line in lines})


def final_losses(lines: Sequence[Mapping[str, Any]], method: str, rate: float) -> list[float | None]:
    """Held-out loss after the last step, one a seed; None where the run diverged."""
    return [
        line["loss"] for line in lines
        if line["kind"] == "point" and (line["method"], line["lr"]) == (method, rate) and line["step"] == line["steps"]
    ]  # fmt: skip


def _band(lines: Sequence[Mapping[str, Any]], method: str, smooth: int = 10) -> Curve | None:
    """Training loss against step: mean over rates and seeds, ± one standard deviation, averaged over `smooth` steps."""
    losses = [line["losses"] for line in runs(lines, method)]
    longest = max(map(len, losses), default=0)
    at: list[float] = []
    mean, low, high = [], [], []
    for start in range(0, longest - smooth + 1, smooth):
        values = [statistics.fmean(x[start : start + smooth]) for x in losses if len(x) >= start + smooth]
        spread = statistics.pstdev(values)
        at.append(start + smooth)
        mean.append(statistics.fmean(values))
        low.append(mean[-1] - spread)
        high.append(mean[-1] + spread)
    return Curve(f"{METHODS[method]}: mean ± sd over rates and seeds", at, mean, (low, high)) if at else None


def draw(lines: Sequence[Mapping[str, Any]], plots: Path) -> list[Path]:
    """The band of the training loss; the final held-out loss by rate; spikes by rate."""
    bands = [curve for method in TWO if (curve := _band(lines, method))]
    final, counted = [], []
    for method in TWO:
        rows = [(rate, [x for x in final_losses(lines, method, rate) if x is not None]) for rate in rates(lines)]
        rows = [(rate, values) for rate, values in rows if values]
        if rows:
            means = [statistics.fmean(values) for _, values in rows]
            edges = ([min(values) for _, values in rows], [max(values) for _, values in rows])
            final.append(Curve(METHODS[method], [rate for rate, _ in rows], means, edges))
        at = [rate for rate in rates(lines) if runs(lines, method, rate)]
        counts = [float(sum(spikes(run["losses"]) for run in runs(lines, method, rate))) for rate in at]
        counted.append(Curve(METHODS[method], at, counts))
    base = lines[0]["base"]
    panels = [
        Panel(base, "optimizer step", "training loss, nats", bands),
        Panel("after the last step (diverged runs missing)", "learning rate", "held-out loss, nats", final, log_x=True),
        Panel(f"spikes (> {SPIKE:g} nat above the median before)", "learning rate", "count", counted, log_x=True),
    ]
    return [draw_panels(panels, plots / "figure5.png")]


def table(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and one row a method and rate: final losses by seed, spikes, divergence."""
    rows = [["method", "rate", "held-out loss, each seed", "spikes, each seed", "diverged at step"]]
    for method in TWO:
        for rate in rates(lines):
            found = runs(lines, method, rate)
            if found:
                losses = ", ".join("–" if x is None else f"{x:.3f}" for x in final_losses(lines, method, rate))
                counts = ", ".join(str(spikes(run["losses"])) for run in found)
                ends = ", ".join(str(run["diverged"]["step"]) for run in found if run["diverged"])
                rows.append([METHODS[method], f"{rate:g}", losses, counts, ends or "never"])
    return rows
