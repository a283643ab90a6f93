"""What figures 2 to 4 share: means over seeds with their spread, from record lines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .panels import Curve, Panel
from .plan import METHODS

Lines = Sequence[Mapping[str, Any]]


def points(lines: Lines, base: str, method: str) -> dict[int, dict[int, Mapping[str, Any]]]:
    """step → seed → evaluation of the runs (not the grid's) of one method."""
    found: dict[int, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "point" and not line["grid"] and (line["base"], line["method"]) == (base, method):
            found.setdefault(line["step"], {})[line["seed"]] = line
    return dict(sorted(found.items()))


def final(lines: Lines, base: str, method: str) -> list[Mapping[str, Any]]:
    """The evaluation after the last planned step, one a seed that got there."""
    steps = points(lines, base, method)
    return [row for rows in steps.values() for row in rows.values() if row["step"] == row["steps"]]


def mean_final(lines: Lines, base: str, method: str, field: str = "accuracy") -> float | None:
    """Mean over seeds of the last evaluation; None while there is none, or where a run diverged."""
    values = [row[field] for row in final(lines, base, method)]
    return statistics.fmean(values) if values and None not in values else None


def accuracy_panel(lines: Lines, base: str, *, log_x: bool = False) -> Panel:
    """Next-token accuracy against step: the mean over seeds, the band from the lowest to the highest."""
    curves = []
    for method, title in METHODS.items():
        at: list[float] = []
        rows: list[list[float]] = []
        for step, seeds in points(lines, base, method).items():
            values = [100 * row["accuracy"] for row in seeds.values() if row["accuracy"] is not None]
            if values and (step or not log_x):
                at.append(step)
                rows.append(values)
        if at:
            band = ([min(r) for r in rows], [max(r) for r in rows])
            curves.append(Curve(title, at, [statistics.fmean(r) for r in rows], band, dashed=method == "ours"))
    return Panel(base, "optimizer step", "next-token accuracy on held-out text, %", curves, log_x=log_x)


def gap_closed(lines: Lines, base: str, method: str = "dark") -> float | None:
    """Share of the accuracy between Performer and exact softmax that `method` recovers; None while one is missing."""
    exact, performer, own = (mean_final(lines, base, name) for name in ("exact", "performer", method))
    if exact is None or performer is None or own is None or exact == performer:
        return None
    return (own - performer) / (exact - performer)


def score_table(lines: Lines) -> list[list[str]]:
    """Header, then a row a base and method: accuracy (each seed), loss, share of the gap, rate, steps."""
    rows = [["model", "method", "accuracy", "each seed", "loss", "gap to softmax closed", "rate", "steps"]]
    for base in dict.fromkeys(line["base"] for line in lines):
        for method, title in METHODS.items():
            last = final(lines, base, method)
            if not last:
                continue
            accuracy, loss = (mean_final(lines, base, method, field) for field in ("accuracy", "loss"))
            gap = None if method in ("exact", "performer") else gap_closed(lines, base, method)
            each = ", ".join("diverged" if r["accuracy"] is None else f"{r['accuracy']:.2%}" for r in last)
            rows.append([
                base, title, "diverged" if accuracy is None else f"{accuracy:.2%}", each,
                "–" if loss is None else f"{loss:.3f}", "" if gap is None else f"{gap:+.0%}",
                f"{last[0]['lr']:g}", str(last[0]["steps"]),
            ])  # fmt: skip
    return rows
