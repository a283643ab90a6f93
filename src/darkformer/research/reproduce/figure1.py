"""Figure 1: cost against sequence length. Softmax grows with L², the features with L·m."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import RunFolderError
from ...reporting import Reporter
from ..bench import WIDE, Bench, Plan, Sweep
from ..bench_targets import slope
from .panels import Curve, Panel, draw_panels
from .plan import Scale

FIGURES = ("1",)
QUESTION = "What does attention cost against the length of the sequence?"
#: Lengths from which on a slope is fitted: below, fixed costs hide it.
ASYMPTOTIC = 2048
#: Length at which other numbers of features are measured as well.
OTHERS_AT = 8192


def measure(scale: Scale, folder: Path, reporter: Reporter) -> list[dict[str, Any]]:
    """One record line a point: seconds and peak scratch memory of a forward pass, by `darkformer bench`."""
    sweep = Sweep((WIDE,), scale.lengths, ("float32",), ("forward",))
    others = tuple(WIDE._replace(name=f"m {m}", features=m) for m in (64, 256, 512))
    more = Sweep(others, tuple(n for n in scale.lengths if n == OTHERS_AT), ("float32",), ("forward",))
    plan = Plan("figure 1", (sweep, more), seconds=0.6, decode=(), model=False)
    try:
        bench = Bench(plan, folder, reporter)
    except RunFolderError:  # begun by another commit or on another machine: its points cannot stand beside new ones
        bench = Bench(plan, folder, reporter, overwrite=True)
    record = bench.run()
    return [
        {
            "kind": "cost", "figure": "1", "path": row["path"], "length": row["length"], "shape": row["shape"],
            "seconds": row["median"], "iqr": row["iqr"], "scratch_bytes": row["peak_scratch_bytes"],
            "environment": record["environment"],
        }
        for row in record["points"]
    ]  # fmt: skip


def _series(lines: Sequence[Mapping[str, Any]], path: str, field: str) -> tuple[list[int], list[float]]:
    rows = sorted(
        (r for r in lines if r["path"] == path and r["shape"]["name"] == WIDE.name), key=lambda r: r["length"]
    )
    rows = [r for r in rows if r[field]]
    return [r["length"] for r in rows], [r[field] for r in rows]


def fitted(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Path → exponent of time and memory from `ASYMPTOTIC` tokens on (or over all, where fewer than two remain)."""
    result: dict[str, dict[str, float]] = {}
    for path in dict.fromkeys(r["path"] for r in lines):
        result[path] = {}
        for field in ("seconds", "scratch_bytes"):
            at, values = _series(lines, path, field)
            late = [(n, v) for n, v in zip(at, values, strict=True) if n >= ASYMPTOTIC]
            chosen = late if len(late) > 1 else list(zip(at, values, strict=True))
            result[path][field] = slope(*zip(*chosen, strict=True)) if len(chosen) > 1 else math.nan
    return result


def draw(lines: Sequence[Mapping[str, Any]], plots: Path) -> list[Path]:
    """Time and memory against length, log-log."""
    slopes, panels = fitted(lines), []
    for field, unit, factor in (("seconds", "seconds", 1.0), ("scratch_bytes", "peak scratch memory, MB", 1e-6)):
        curves = []
        for path, found in slopes.items():
            at, values = _series(lines, path, field)
            title = "softmax (torch)" if path == "sdpa" else f"random features ({path})"
            curves.append(Curve(f"{title}, slope {found[field]:.2f}", at, [factor * v for v in values]))
        panels.append(Panel("forward, 8 heads, d 64, m 128", "tokens", unit, curves, log_x=True, log_y=True))
    return [draw_panels(panels, plots / "figure1.png")]


def table(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and one row a path: slopes, then milliseconds by length."""
    lengths = sorted({r["length"] for r in lines if r["shape"]["name"] == WIDE.name})
    rows = [["path", "slope of time", "slope of memory", *(f"{n:,}, ms" for n in lengths)]]
    for path, found in fitted(lines).items():
        at = dict(zip(*_series(lines, path, "seconds"), strict=True))
        cells = [f"{1e3 * at[n]:.1f}" if n in at else "–" for n in lengths]
        rows.append([path, f"{found['seconds']:.2f}", f"{found['scratch_bytes']:.2f}", *cells])
    return rows
