"""How far float32 sums drift over long streams: 200,000 tokens as they are, 10 million by the rule that joins them.

    python benchmarks/drift.py --out benchmarks/records/drift.json

A constant stream, whose every output is the value itself, and a random one, against float64. The simulation is that of
one total: joins of one token (steps) and of 64 (chunks), rounded to nearest, and as the library does it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import darkformer
from darkformer.ops import native
from darkformer.ops.state import join
from darkformer.records import environment

HEAD_DIM = 64


def run(length: int, constant: bool) -> dict[str, float]:
    """Relative error of the last output of each path."""
    torch.manual_seed(0)
    fm = darkformer.feature_map(darkformer.DarkConfig(), num_heads=1, num_kv_heads=1, head_dim=HEAD_DIM)
    tokens = 1 if constant else length
    query, key, value = (torch.randn(1, 1, tokens, HEAD_DIM).expand(-1, -1, length, -1).contiguous() for _ in range(3))
    inputs, last, errors = (query, key, value), slice(length - 1, length), {}
    state = None
    for start in range(0, length, 2000):  # sums of 2,000 tokens in float64
        piece = (x[:, :, start : start + 2000].double() for x in inputs)
        want, state = darkformer.attention(
            *piece, fm, initial_state=state, return_state=True, backend="chunked"
        )  # fmt: skip
    want = value[:, :, last].double() if constant else want[:, :, -1:]

    def error(output: torch.Tensor) -> float:
        return ((output[:, :, -1:].double() - want).norm() / want.norm()).item()

    for backend in ("native", "chunked"):
        errors[backend] = error(darkformer.attention(*inputs, fm, backend=backend))
    _, state = darkformer.attention(*(x[:, :, :1] for x in inputs), fm, return_state=True)
    step = native.Step(state, fm, scaling=HEAD_DIM**-0.5, softcap=None)
    for t in range(1, length):
        output = step(*(x[:, :, t : t + 1] for x in inputs))
    return errors | {"step": error(output)}


def simulate(joins: int, dithered: bool, constant: bool) -> float:
    """Largest relative error of 16 totals of so many summands (of chunks: each stands for their sum)."""
    generator = np.random.default_rng(0)
    total, exact = np.zeros(16, np.float32), np.zeros(16)
    equal = generator.uniform(0.3, 1, 16).astype(np.float32)
    mask, golden = np.int32(0x7F800000), 0x9E3779B9
    for i in range(joins):
        summand = equal if constant else equal * generator.random(16, np.float32)
        exact += summand
        if dithered:
            u = np.float32(((i * golden & 0xFFFFFFFF) / 2**32 - 0.5) / 2**23)
            summand = summand + (total.view(np.int32) & mask).view(np.float32) * u
        total = total + summand
        if i == 100:  # the simulation is the library's rule
            one, position = torch.ones(()), torch.tensor([i + 1])
            u = np.float32((((i + 1) * golden & 0xFFFFFFFF) / 2**32 - 0.5) / 2**23)
            own = total + (equal + (total.view(np.int32) & mask).view(np.float32) * u)
            ours = join(torch.from_numpy(total)[None], one, torch.from_numpy(equal), position)[0]
            assert np.abs(ours.numpy() - own).max() <= np.spacing(own.max()), (ours, own)
    return float(np.abs(total / exact - 1).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000, help="Tokens that are run.")
    parser.add_argument("--simulated", type=int, default=10_000_000, help="Tokens that are simulated.")
    parser.add_argument("--out", type=Path, help="Where to write the record (JSON); without it, print only.")
    options = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "drift", "environment": environment(), "tokens": options.tokens}
    with torch.no_grad():
        record["run"] = {name: run(options.tokens, name == "constant") for name in ("constant", "random")}
    print(record["run"], flush=True)
    record["simulated_tokens"], record["simulated"] = options.simulated, []
    for size in (1, 64):
        for constant in (True, False):
            for dithered in (False, True):
                error = simulate(options.simulated // size, dithered, constant)
                row = {"tokens_a_join": size, "constant": constant, "dithered": dithered, "error": error}
                record["simulated"].append(row)
                print(row, flush=True)
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
