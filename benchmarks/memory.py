"""Peak memory and time of forward + backward of `chunked` against the length: is it linear?

    python benchmarks/memory.py --lengths 4096 16384 65536 --threads 1 --out benchmarks/records/memory.json

One fresh process a row, because a process's high-water mark never falls. Linux only (it reads /proc/self).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import darkformer
from darkformer.records import environment

SHAPE = {"batch": 1, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "num_features": 128, "sinks": 0}
MIB = 2**20


def resident_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its highest value) of this process. Per address space: nothing of the parent's."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure(length: int, window: int, repeats: int) -> dict[str, Any]:
    """One row, in this process: peak bytes of the first forward + backward above the baseline before it, then times."""
    config = darkformer.DarkConfig(num_features=SHAPE["num_features"], window=window, sinks=SHAPE["sinks"])
    feature_map = darkformer.feature_map(
        config, num_heads=SHAPE["num_heads"], num_kv_heads=SHAPE["num_kv_heads"], head_dim=SHAPE["head_dim"]
    )
    torch.manual_seed(0)

    def inputs(tokens: int) -> list[torch.Tensor]:
        heads = (SHAPE["num_heads"], SHAPE["num_kv_heads"], SHAPE["num_kv_heads"])
        return [torch.randn(SHAPE["batch"], n, tokens, SHAPE["head_dim"], requires_grad=True) for n in heads]

    def run(tensors: list[torch.Tensor]) -> tuple[float, float]:
        for x in (*tensors, *feature_map.parameters()):
            x.grad = None
        start = time.perf_counter()
        output = darkformer.attention(*tensors, feature_map, backend="chunked")
        middle = time.perf_counter()
        output.backward(torch.ones_like(output))
        return middle - start, time.perf_counter() - start

    run(inputs(64))  # libraries and threads come into memory with the first call, whatever its length
    tensors = inputs(length)
    baseline = resident_bytes("VmRSS")
    run(tensors)
    peak = resident_bytes("VmHWM") - baseline
    times = [run(tensors) for _ in range(repeats)]
    forward, both = zip(*times, strict=True)
    return {
        "length": length,
        "window": window,
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "bytes_per_token": peak / length,
        "forward_seconds": spread(forward),
        "forward_backward_seconds": spread(both),
        "threads": torch.get_num_threads(),
    }


def spread(seconds: tuple[float, ...]) -> dict[str, Any]:
    """Median, interquartile range and number of runs."""
    low, high = np.percentile(seconds, [25, 75])
    return {"median": statistics.median(seconds), "iqr": float(high - low), "runs": len(seconds)}


def slope(rows: list[dict[str, Any]], value: str) -> float | None:
    """Exponent of the growth of `value` with the length: least squares on the logarithms. 1 is linear, 2 quadratic."""
    if len(rows) < 2:
        return None
    x, y = ([math.log(row[name]) for row in rows] for name in ("length", value))
    return float(np.polyfit(x, y, 1)[0])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536], help="Tokens L of the rows.")
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 64], help="Exact windows W of the rows.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed runs of a row (3 from 32k tokens on).")
    parser.add_argument("--threads", type=int, help="Threads of every row; 1 is steady on a shared machine.")
    parser.add_argument("--out", type=Path, help="Where to write the record (JSON); without it, print only.")
    parser.add_argument("--row", type=int, nargs=3, metavar=("L", "W", "RUNS"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.row:  # the fresh process of one row
        print(json.dumps(measure(*options.row)))
        return
    surroundings, rows = environment(), []
    print(
        f"{'window':>6} {'tokens':>7} {'peak MiB':>9} {'KiB/token':>10} {'forward s':>10} {'fwd+bwd s':>10} {'IQR':>7}"
    )
    for window in options.windows:
        for length in options.lengths:
            repeats = min(options.repeats, 3) if length >= 32768 else options.repeats
            command = [sys.executable, __file__, "--row", *map(str, (length, window, repeats))]
            command += ["--threads", str(torch.get_num_threads())]
            row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            rows.append(row)
            both = row["forward_backward_seconds"]
            print(
                f"{window:>6} {length:>7} {row['peak_bytes'] / MIB:>9.1f} {row['bytes_per_token'] / 1024:>10.2f} "
                f"{row['forward_seconds']['median']:>10.3f} {both['median']:>10.3f} {both['iqr']:>7.3f}",
                flush=True,
            )
    slopes = {str(w): slope([row for row in rows if row["window"] == w], "peak_bytes") for w in options.windows}
    for window, value in slopes.items():
        print(f"window {window}: peak memory grows as L^{value:.3f}" if value else f"window {window}: one length only")
    if options.out:
        record = {
            "benchmark": "memory", "environment": surroundings, "shape": {**SHAPE, "dtype": "float32"},
            "rows": rows, "slope_of_log_peak_over_log_length": slopes,
        }  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
