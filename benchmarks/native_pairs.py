"""Time of two versions of the compiled attention, in pairs in one process, and whether they give the same numbers.

    git worktree add /tmp/before COMMIT
    python benchmarks/native_pairs.py /tmp/before/src src --out benchmarks/records/native-pairs.json

Each turn runs both versions once on the same tensors, in alternating order, and yields one ratio; a row is the median
ratio after/before with its interquartile range. Where memory happens to lie makes a lasting difference of some percent,
so a row has several rounds with new tensors and new working memory, and which version comes first alternates.
On a busy machine use one thread and its processor time, the defaults.
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
PASSES = ("forward", "forward+backward", "steps")
#: Single tokens of one call of `steps`, which go on from a state that has read the row's length.
STEPS = 32
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


def runner(package: ModuleType, inputs: list[torch.Tensor], passes: str) -> Callable[[], list[torch.Tensor]]:
    """One call on these tensors; returns the output and, with a backward pass, all gradients."""
    backward = passes == "forward+backward"
    config = package.DarkConfig(num_features=FEATURES, window=WINDOW, sinks=SINKS)
    torch.manual_seed(0)
    feature_map = package.feature_map(config, num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM)
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    wanted = [*leaves, *(x for x in feature_map.parameters() if x.requires_grad)]
    grad_output = torch.ones_like(inputs[2])

    if passes == "steps":
        with torch.no_grad():
            _, read = package.attention(*leaves, feature_map, return_state=True, backend="native")
        tokens = [[x[:, :, i : i + 1] for x in leaves] for i in range(STEPS)]

        @torch.no_grad()
        def decode() -> list[torch.Tensor]:
            state, outputs = read, []
            for token in tokens:
                output, state = package.attention(
                    *token, feature_map, initial_state=state, return_state=True, backend="native"
                )
                outputs.append(output)
            return outputs

        return decode

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


def take_turns(
    runs: list[Callable[[], Any]], count: int, repeats: int, first: int, clock: Callable[[], float]
) -> list[tuple[float, float]]:
    """Seconds of before and after (runs) in so many turns of `repeats` calls each; `first` begins."""
    pairs = []
    for turn in range(count):
        seconds = [0.0, 0.0]
        for which in (first, 1 - first) if turn % 2 == 0 else (1 - first, first):
            start = clock()
            for _ in range(repeats):
                runs[which]()
            seconds[which] = (clock() - start) / repeats
        pairs.append((seconds[0], seconds[1]))
    return pairs


def measure(
    versions: list[ModuleType], dtype: str, length: int, passes: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the record."""
    generator = torch.Generator().manual_seed(length)
    pairs, differs, repeats = [], 0.0, 1
    for number in range(options.rounds):
        first = number % 2
        for version in versions:
            version.ops.native.release()
        shape = (1, HEADS, length, HEAD_DIM)
        inputs = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(3)]
        runs = [runner(version, inputs, passes) for version in versions]
        results = {which: runs[which]() for which in (first, 1 - first)}
        differs = max(differs, difference(results[0], results[1]))
        start = time.perf_counter()
        runs[0](), runs[1]()
        both = time.perf_counter() - start
        if number == 0:
            repeats = max(1, int(2e-3 / both))  # short calls are timed several at once
        count = max(options.turns, int(options.seconds / options.rounds / (both * repeats)))
        pairs += take_turns(runs, count, repeats, first, CLOCKS[options.clock])
    ratios = [after / before for before, after in pairs]
    low, high = np.percentile(ratios, [25, 75])
    before, after = zip(*pairs, strict=True)
    return {
        "dtype": dtype,
        "length": length,
        "pass": passes,
        "before_seconds": statistics.median(before),
        "after_seconds": statistics.median(after),
        "ratio": statistics.median(ratios),
        "ratio_iqr": [float(low), float(high)],
        "ratio_of_fastest": min(after) / min(before),
        "turns": len(pairs),
        "calls_per_turn": repeats,
        "rounds": options.rounds,
        "relative_difference": differs,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="Source folder of the earlier version (holds darkformer/).")
    parser.add_argument("after", type=Path, help="Source folder of the later version.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 2048, 8192], help="Tokens L of the rows.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="Dtypes of the rows.")
    parser.add_argument(
        "--passes", nargs="+", choices=PASSES, default=PASSES, help=f"Rows of a length; {STEPS} steps are one call."
    )
    parser.add_argument("--seconds", type=float, default=10, help="Time of a row, about.")
    parser.add_argument("--rounds", type=int, default=6, help="Rounds of a row, each with new tensors and memory.")
    parser.add_argument("--turns", type=int, default=7, help="Turns of a round, at least.")
    parser.add_argument("--threads", type=int, default=1, help="Threads.")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="Processor time of the calling thread, or wall.")
    parser.add_argument("--out", type=Path, help="Where to write the record (JSON); without it, print only.")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    sources = [options.before.resolve(), options.after.resolve()]
    versions = [load(source) for source in sources]
    rows = []
    print("    dtype  tokens             pass  before ms  after ms  ratio          IQR  fastest  turns")
    for dtype in options.dtypes:
        for length in options.lengths:
            for passes in options.passes:
                row = measure(versions, dtype, length, passes, options)
                rows.append(row)
                low, high = row["ratio_iqr"]
                print(
                    f"{dtype:>9} {length:>7} {row['pass']:>16} {1e3 * row['before_seconds']:>10.3f} "
                    f"{1e3 * row['after_seconds']:>9.3f} {row['ratio']:>6.3f} {low:>6.3f}–{high:.3f} "
                    f"{row['ratio_of_fastest']:>8.3f} {row['turns']:>6}"
                    + (f"  differs by {row['relative_difference']:.1e}" if row["relative_difference"] else ""),
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
