"""Time of two versions of the compiled attention, in pairs in one process, and whether they give the same numbers.

    git worktree add /tmp/before COMMIT
    python benchmarks/native_pairs.py /tmp/before/src src --out benchmarks/records/native-pairs.json

Each turn runs both versions once on the same tensors, in alternating order, and yields one ratio; a row is the median
ratio after/before with its interquartile range. On a busy machine use one thread and its processor time, the defaults.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

HEADS, HEAD_DIM, FEATURES, WINDOW, SINKS = 8, 64, 128, 64, 4
CLOCKS = {"cpu": time.thread_time, "wall": time.perf_counter}


def load(source: Path) -> ModuleType:
    """The package `darkformer` in a folder; modules of an earlier one stay alive where they are used."""
    for name in [name for name in sys.modules if name.split(".")[0] == "darkformer"]:
        del sys.modules[name]
    sys.path.insert(0, str(source))
    try:
        package = importlib.import_module("darkformer")
        importlib.import_module("darkformer.ops.native.op")
        importlib.import_module("darkformer.records")
    finally:
        sys.path.remove(str(source))
    if not Path(str(package.__file__)).is_relative_to(source.resolve()):
        raise SystemExit(f"{source}: darkformer was imported from {package.__file__}")
    return package


def commit(source: Path) -> str:
    """The commit of a source folder, with a mark if the folder differs from it."""
    words = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def runner(package: ModuleType, inputs: list[torch.Tensor], backward: bool) -> Callable[[], list[torch.Tensor]]:
    """One call on these tensors; returns the output and, with `backward`, all gradients."""
    config = package.DarkConfig(num_features=FEATURES, window=WINDOW, sinks=SINKS)
    torch.manual_seed(0)
    feature_map = package.feature_map(config, num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM)
    leaves = [x.detach().clone().requires_grad_(backward) for x in inputs]
    wanted = [*leaves, *(x for x in feature_map.parameters() if x.requires_grad)]
    grad_output = torch.ones_like(inputs[2])

    def run() -> list[torch.Tensor]:
        with torch.set_grad_enabled(backward):
            output = package.attention(*leaves, feature_map, backend="native")
        if not backward:
            return [output]
        found = torch.autograd.grad(output, wanted, grad_output, allow_unused=True)
        return [output, *(x for x in found if x is not None)]

    return run


def difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """The largest difference of two runs relative to each tensor's largest number; 0 if they are equal bit by bit."""
    pairs = zip(before, after, strict=True)
    return max(
        float((a.detach().double() - b.detach().double()).abs().max() / b.detach().abs().max().clamp_min(1e-30))
        for b, a in pairs
    )


def measure(runs: list[Callable[[], Any]], turns: int, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Times of before and after (runs) in turns of `repeats` calls each."""
    seconds: list[list[float]] = [[], []]
    for turn in range(turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = clock()
            for _ in range(repeats):
                runs[which]()
            seconds[which].append((clock() - start) / repeats)
    ratios = [after / before for before, after in zip(*seconds, strict=True)]
    low, high = np.percentile(ratios, [25, 75])
    return {
        "before_seconds": statistics.median(seconds[0]),
        "after_seconds": statistics.median(seconds[1]),
        "ratio": statistics.median(ratios),
        "ratio_iqr": [float(low), float(high)],
        "turns": turns,
        "calls_per_turn": repeats,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="Source folder of the earlier version (holds darkformer/).")
    parser.add_argument("after", type=Path, help="Source folder of the later version.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 2048, 8192], help="Tokens L of the rows.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="Dtypes of the rows.")
    parser.add_argument(
        "--seconds", type=float, default=10, help="Time of a row, if its turns are not fewer than these:"
    )
    parser.add_argument("--turns", type=int, default=41, help="Turns of a row, at least.")
    parser.add_argument("--threads", type=int, default=1, help="Threads.")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="Processor time of the calling thread, or wall.")
    parser.add_argument("--out", type=Path, help="Where to write the record (JSON); without it, print only.")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    sources = [options.before.resolve(), options.after.resolve()]
    versions = [load(source) for source in sources]
    clock, rows = CLOCKS[options.clock], []
    print("    dtype  tokens             pass  before ms  after ms  ratio          IQR  turns")
    for dtype in options.dtypes:
        for length in options.lengths:
            generator = torch.Generator().manual_seed(length)
            shape = (1, HEADS, length, HEAD_DIM)
            inputs = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(3)]
            for backward in (False, True):
                runs = [runner(package, inputs, backward) for package in versions]
                differs = difference(runs[0](), runs[1]())
                start = time.perf_counter()
                runs[0](), runs[1]()
                both = time.perf_counter() - start
                repeats = max(1, int(2e-3 / both))  # short calls are timed several at once
                turns = max(options.turns, int(options.seconds / (both * repeats)))
                row = {"dtype": dtype, "length": length, "pass": "forward+backward" if backward else "forward"}
                row |= measure(runs, turns, repeats, clock) | {"relative_difference": differs}
                rows.append(row)
                print(
                    f"{dtype:>9} {length:>7} {row['pass']:>16} {1e3 * row['before_seconds']:>10.3f} "
                    f"{1e3 * row['after_seconds']:>9.3f} {row['ratio']:>6.3f} "
                    f"{row['ratio_iqr'][0]:>6.3f}–{row['ratio_iqr'][1]:.3f} {row['turns']:>6}"
                    + (f"  differs by {differs:.1e}" if differs else ""),
                    flush=True,
                )
    if options.out:
        record = {
            "benchmark": "native_pairs",
            "environment": sys.modules["darkformer.records"].environment(),
            "commits": dict(zip(("before", "after"), map(commit, sources), strict=True)),
            "clock": options.clock,
            "shape": {
                "batch": 1, "num_heads": HEADS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM, "num_features": FEATURES,
                "window": WINDOW, "sinks": SINKS,
            },
            "rows": rows,
        }  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
