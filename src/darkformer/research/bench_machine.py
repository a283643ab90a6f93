"""What the machine can do, and how long and how much memory a call takes."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..ops import native

#: Sizes of the products whose speed is the peak: what attention multiplies, and a large square.
PRODUCTS = ((8, 1024, 64, 128), (8, 1024, 128, 64), (1, 1024, 1024, 1024))
#: Below this share of float32's speed products of bfloat16 are emulated: a call would take minutes.
EMULATED = 0.5
#: Seconds of a call above which it is run once only.
PATIENCE = 15.0


def measure_in_turns(
    calls: Sequence[Callable[[], Any]], *, seconds: float, most: int = 60, least: int = 7
) -> list[dict[str, Any]]:
    """Median, interquartile range, best and medians of turns of the seconds of each call, after a warm-up.

    The calls take turns, `least` of them each: a machine that changes its speed meanwhile changes it for all alike.
    A call that alone takes longer than `seconds` and `PATIENCE` is not repeated: `runs` is 1, its warm-up is reported.
    """

    def once(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    first = [once(call) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    turns: list[list[float]] = [[] for _ in calls]
    for _ in range(least):
        for call, spent, medians, warm in zip(calls, times, turns, first, strict=True):
            if warm > max(seconds, PATIENCE):
                spent[:] = medians[:] = [warm]
                continue
            turn = [once(call)]
            while sum(turn) < seconds / least and len(turn) < most // least:
                turn.append(once(call))
            spent.extend(turn)
            medians.append(statistics.median(turn))
    rows = []
    for spent, medians in zip(times, turns, strict=True):
        low, high = np.percentile(spent, [25, 75])
        rows.append({
            "median": statistics.median(spent), "iqr": float(high - low), "best": min(spent), "runs": len(spent),
            "turns": medians,
        })  # fmt: skip
    return rows


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_scratch(call: Callable[[], Any], known: int) -> int | None:
    """Bytes `call` holds at its peak beyond what was there before and `known` (outputs, gradients). Linux; else None.

    Freed memory and buffers kept for the next call go back to the system first: they would serve the call unseen.
    """
    try:
        native.release()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before - known)
    except (OSError, AttributeError, StopIteration):
        return None


def limits(seconds: float, dtypes: Sequence[str] = ("float32", "bfloat16")) -> dict[str, Any]:
    """GEMM FLOP/s per dtype and size, exponentials a second, bytes copied a second; each for about `seconds`.

    From the best repetition, not the median: a limit is what the machine can do when nothing disturbs it.
    """

    def best(call: Callable[[], Any]) -> float:
        return float(measure_in_turns([call], seconds=seconds, most=200)[0]["best"])

    found: dict[str, Any] = {"gemm_flops": {}, "gemm_flops_by_size": {}}
    for name in dtypes:
        dtype = getattr(torch, name)
        rates: dict[str, float] = {}
        for batch, n, k, p in PRODUCTS:
            x, y = torch.randn(batch, n, k).to(dtype), torch.randn(batch, k, p).to(dtype)
            out = torch.empty(batch, n, p, dtype=dtype)
            if rates and max(rates.values()) < EMULATED * found["gemm_flops"].get("float32", 0.0):
                break  # a large product would take seconds
            rates[f"{batch}x{n}x{k}x{p}"] = 2 * batch * n * k * p / best(partial(torch.bmm, x, y, out=out))
        found["gemm_flops"][name], found["gemm_flops_by_size"][name] = max(rates.values()), rates
    x, target = torch.rand(1 << 18), torch.empty(1 << 18)
    found["exps_per_second"] = x.numel() / best(partial(torch.exp2, x, out=target))
    big, copy = torch.ones(1 << 24), torch.empty(1 << 24)
    found["bytes_per_second"] = 2 * big.nbytes / best(partial(copy.copy_, big))
    return found


def highest(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The larger of each two rates of `limits`; what only one of them holds stays."""
    found = before | now
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        found[name] = highest(old, new) if isinstance(old, dict) else max(old, new)
    return found
