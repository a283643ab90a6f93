"""A full record of `darkformer bench` as tables of markdown, with the targets of the speed work or without."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..cost import times_as_fast
from .bench_paths import SOFTMAX

Row = Mapping[str, Any]
WIDE, GEMMA = (8, 8, 64, 128), (4, 1, 256, 256)  # heads, kv heads, d, m
LENGTHS = (4096, 8192, 16384, 65536)
#: With an exact window of 64 this share of the aimed speed-up.
WINDOWED = 0.7
#: Largest slope of log time against log length between the first and the last of `LENGTHS`.
SLOPE = 1.05


class Aim(NamedTuple):
    """Speed-up over softmax at each of `LENGTHS`, and the share of the lower bound."""

    path: str
    direction: str
    dtype: str
    ratios: tuple[float, float, float, float]
    share: float


AIMS = (
    Aim("native", "forward", "float32", (8, 14, 27, 95), 0.80),
    Aim("native", "forward", "bfloat16", (8, 14, 27, 90), 0.55),
    Aim("native", "forward+backward", "float32", (6, 12, 24, 85), 0.65),
    Aim("native", "forward+backward", "bfloat16", (10, 18, 35, 120), 0.40),
    Aim("chunked", "forward", "float32", (4, 8, 15, 45), 0.45),
)
#: path, direction, dtype, tokens
CROSSOVERS = (
    ("native", "forward", "float32", 512), ("native", "forward", "bfloat16", 512),
    ("native", "forward+backward", "float32", 1024), ("native", "forward+backward", "bfloat16", 1024),
    ("chunked", "forward", "float32", 1024),
)  # fmt: skip
#: peer, tokens, direction, times as fast
PEERS = (
    ("darkformer-pytorch", 4096, "forward", 5), ("darkformer-pytorch", 16384, "forward+backward", 20),
    ("performer-pytorch", 4096, "forward", 50),
)  # fmt: skip
SCRATCH = (("native", 16), ("chunked", 64))  # MB at 64k
#: task of `bench_model`, what is said of it, times as fast as softmax
END_TO_END = (
    ("prefill", "prefill at 8k", 2.5), ("training step", "training step at 4k", 1.3),
    ("generation, one token", "a generated token after 8k (softmax: after 512)", 1.0),
)  # fmt: skip


class Line(NamedTuple):
    """One target with one number: `met` None where it was not measured."""

    target: str
    aim: str
    measured: str
    met: bool | None


def _mark(measured: float | None, aim: float, text: str, *, below: bool = False) -> str:
    """The number, bold where it reaches the aim."""
    if measured is None:
        return "–"
    return f"**{text}**" if (measured <= aim if below else measured >= aim) else text


def slope(lengths: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of a power law through the points, least squares in logs: 2 is quadratic, 1 linear."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0]) if len(lengths) > 1 else math.nan


class Measured:
    """Looks numbers up in a record."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record

    def rows(self, path: str, sizes: tuple[int, ...], window: int, dtype: str, direction: str) -> dict[int, Row]:
        """Rows by length."""
        found = {}
        own: tuple[int, ...]
        for row in self.record["points"]:
            s = row["shape"]
            own, wanted = (s["heads"], s["kv_heads"], s["dim"]), sizes[:3]
            if path != SOFTMAX.name:  # which has neither features nor a window
                own, wanted = (*own, s["features"], s["window"]), (*sizes, window)
            if (row["path"], row["dtype"], row["direction"]) == (path, dtype, direction) and own == wanted:
                found[row["length"]] = row
        return found

    def ratio(
        self, path: str, length: int, dtype: str, direction: str, *,
        sizes: tuple[int, ...] = WIDE, window: int = 0, against: str = SOFTMAX.name,
    ) -> float | None:  # fmt: skip
        """How many times as fast as `against`; None where one of them was not measured."""
        ours = self.rows(path, sizes, window, dtype, direction).get(length)
        theirs = self.rows(against, sizes, 0, dtype, direction).get(length)
        return None if ours is None or theirs is None else times_as_fast(ours, theirs)

    def slope(self, path: str, dtype: str, direction: str, window: int) -> float | None:
        """Of log time against log length over `LENGTHS`, by least squares; None unless all were measured."""
        rows = self.rows(path, WIDE, window, dtype, direction)
        if not set(LENGTHS) <= rows.keys():
            return None
        return slope(LENGTHS, [rows[n]["median"] for n in LENGTHS])

    def crossover(self, path: str, direction: str, dtype: str) -> tuple[bool, float | None]:
        """Whether it was measured, and the length (None: not reached)."""
        for row in self.record.get("crossover", ()):
            s = row["shape"]
            same = (s["heads"], s["kv_heads"], s["dim"], s["features"], s["window"]) == (*WIDE, 0)
            if same and (row["path"], row["direction"], row["dtype"]) == (path, direction, dtype):
                return True, row["tokens"]
        return False, None

    def error(self, dtype: str) -> float | None:
        """The worst error of `native` over outputs and gradients of all shapes; bfloat16: in units of softmax's own."""
        found = [
            e / (row["allowed"][name] / 1.3 if dtype == "bfloat16" else 1)
            for row in self.record["parity"]
            if row["path"] == "native" and row["dtype"] == dtype
            for name, e in row["errors"].items()
        ]
        return max(found, default=None)

    def task(self, name: str) -> float | None:
        """Seconds of the softmax model over those of the linear one."""
        took = {row["model"]: row for row in self.record["model"] if row["task"] == name}
        return times_as_fast(took["linear"], took["softmax"]) if len(took) == 2 else None


def _speed_table(found: Measured, aims: bool) -> Iterable[str]:
    lengths = " | ".join(f"{n // 1024}k" for n in LENGTHS)
    yield f"| times as fast as softmax | | {lengths} | of the bound, 16k |" + (" 16k aim needs |" if aims else "")
    yield "|---|---|" + "---:|" * (len(LENGTHS) + 1 + aims)
    for aim in AIMS:
        for window in (0, 64):
            wanted = [ratio if window == 0 else WINDOWED * ratio for ratio in aim.ratios]
            ratios = [found.ratio(aim.path, n, aim.dtype, aim.direction, window=window) for n in LENGTHS]
            row = found.rows(aim.path, WIDE, window, aim.dtype, aim.direction).get(LENGTHS[2])
            share = None if row is None else row["fraction_of_bound"]
            if aims:
                cells = [f"{_mark(r, w, f'{r or 0:.1f}')} ({w:.3g})" for r, w in zip(ratios, wanted, strict=True)]
                cells.append(f"{_mark(share, aim.share, f'{share or 0:.2f}')} ({aim.share:.2f})")
                # The speed-up is in proportion to the share: softmax and the bound are this machine's.
                needed = None if share is None or ratios[2] is None else share * wanted[2] / ratios[2]
                cells.append("–" if needed is None else f"{needed:.2f}")
            else:
                cells = ["–" if r is None else f"{r:.1f}" for r in ratios]
                cells.append("–" if share is None else f"{share:.2f}")
            yield f"| `{aim.path}` {aim.direction}, W {window} | {aim.dtype} | " + " | ".join(cells) + " |"


def _lines(found: Measured) -> Iterable[Line]:
    for path, direction, dtype, wanted in CROSSOVERS:
        there, tokens = found.crossover(path, direction, dtype)
        said = f"{tokens:.0f} tokens" if tokens else "not reached"
        met = tokens is not None and tokens <= wanted if there else None
        yield Line(f"crossover, `{path}` {direction}, {dtype}", f"≤ {wanted}", said, met)
    for peer, length, direction, times in PEERS:
        for path in ("native", "chunked"):
            ratio = found.ratio(path, length, "float32", direction, against=peer)
            yield _at_least(f"`{path}` against {peer}, {direction} at {length // 1024}k", ratio, times, "×")
    for path, most in SCRATCH:
        ways = itertools.product((0, 64), ("float32", "bfloat16"), ("forward", "forward+backward"))
        rows = [found.rows(path, WIDE, *way).get(LENGTHS[-1]) for way in ways]
        known = [row["peak_scratch_bytes"] / 1e6 for row in rows if row and row["peak_scratch_bytes"] is not None]
        worst = max(known, default=None)
        yield _at_most(f"scratch memory at 64k, `{path}`, at worst (both windows and dtypes)", worst, most, " MB", 0)
    for aim in AIMS:
        grown = found.slope(aim.path, aim.dtype, aim.direction, 0)
        yield _at_most(f"slope of time 4k–64k, `{aim.path}` {aim.direction}, {aim.dtype}", grown, SLOPE, "", 2)
    yield _at_most("worst error of `native`, float32 (× 10⁻⁶)", _scaled(found.error("float32"), 1e6), 5, "", 1)
    yield _at_most("worst error of `native`, bfloat16, of softmax's own", found.error("bfloat16"), 1.3, "×", 2)
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "forward+backward"):
            ratio = found.ratio("native", 8192, dtype, direction, sizes=GEMMA)
            yield _at_least(f"Gemma's shape at 8k, {direction}, {dtype}", ratio, 8, "×")
    dtype = next((row.get("dtype", "bfloat16") for row in found.record["model"]), "bfloat16")
    for task, said, least in END_TO_END:
        yield _at_least(f"SmolLM2-135M, {dtype}: {said}", found.task(task), least, "×")


def _scaled(x: float | None, factor: float) -> float | None:
    return None if x is None else factor * x


def _at_least(target: str, x: float | None, aim: float, unit: str) -> Line:
    return Line(target, f"≥ {aim:g}{unit}", "–" if x is None else f"{x:.2g}{unit}" if x < 10 else f"{x:.0f}{unit}",
                None if x is None else x >= aim)  # fmt: skip


def _at_most(target: str, x: float | None, aim: float, unit: str, digits: int) -> Line:
    return Line(target, f"≤ {aim:g}{unit}", "–" if x is None else f"{x:.{digits}f}{unit}",
                None if x is None else x <= aim)  # fmt: skip


def _machine(record: Mapping[str, Any]) -> str:
    where, speed = record["environment"], record["limits"]["gemm_flops"]
    return (
        f"{where['device']}, {where['threads']} threads, matrix products at {speed['float32'] / 1e9:.0f} / "
        f"{speed['bfloat16'] / 1e9:.0f} GFLOP/s (float32 / bfloat16), commit {where['commit']}."
    )


def targets_markdown(record: Mapping[str, Any]) -> str:
    """Both tables: speed-ups with their aims in brackets, and every other target; bold and ✓ where the aim is reached.

    Args:
        record: what a full run of `darkformer bench` writes. What it lacks is a dash.
    """
    found = Measured(record)
    lines = [*_speed_table(found, True), "", "| target | aim | measured | |", "|---|---|---:|---|"]
    for line in _lines(found):
        sign = {True: "✓", False: "✗", None: ""}[line.met]
        lines.append(f"| {line.target} | {line.aim} | {line.measured} | {sign} |")
    lines += [
        "",
        "In brackets the aim. Last column: the share of this machine's bound at which the aim for 16k is reached.",
        f"{_machine(record)} The aims were set on a machine with 376 / 2500 GFLOP/s.",
    ]
    return "\n".join(lines) + "\n"


def measurements_markdown(record: Mapping[str, Any]) -> str:
    """The same two tables without the aims. What the record lacks is a dash in the first and absent from the second."""
    found = Measured(record)
    lines = [*_speed_table(found, False), "", "| | measured |", "|---|---:|"]
    lines += [f"| {line.target} | {line.measured} |" for line in _lines(found) if line.met is not None]
    return "\n".join([*lines, "", _machine(record)])
