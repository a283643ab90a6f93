"""vLLM with softmax and with converted models: tokens a second, bytes a request, time to the first token.

    .venv/bin/python benchmarks/serving.py prepare build/serving
    .venv-vllm/bin/python benchmarks/serving.py run build/serving --out benchmarks/records/serving.json
    .venv/bin/python benchmarks/serving.py picture benchmarks/records/serving.json docs/figures/serving.png

`prepare` writes SmolLM2-135M as it is and converted; it needs darkformer's environment, `run` the one of
`make test-vllm`. All rows of a prompt's length and a model run in one process; the models take turns, and rows that
the record has already are not run again, so an interrupted run goes on where it was. Prompts are random tokens and
the converted models are not calibrated: neither changes what is computed, only what the numbers are. Budget 10% has the
heads and windows that `darkformer linearize --budget 10%` chose (benchmarks/records/frontier-smollm2.json).

Decoding is timed while all requests decode and none reads its prompt. Bytes a request are those of vLLM's blocks in use
at that time. The first token is timed for a request alone, once for a new prompt and once for one that begins with a
prompt read before (`--enable-prefix-caching`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from darkformer.records import environment, read_json, write_json

ROOT = Path(__file__).parents[1]
GIB, MIB = 2**30, 2**20
#: Folder and title of each model.
MODELS = {"softmax": "softmax", "budget-0": "constant state", "budget-10": "budget 10%"}
#: SmolLM2-135M's keys and values of a token in bfloat16.
SOFTMAX_BYTES = 30 * 3 * 2 * 64 * 2
#: Tokens beside the prompt that memory is set aside for.
ROOM = 512
#: The longest request, the same for all rows: vLLM compiles a model anew for each value.
POSITIONS = 8192


def prepare(options: argparse.Namespace) -> None:
    import torch

    import darkformer
    from darkformer.hf.load import demo_model_path, load_model, load_tokenizer

    source = str(demo_model_path())
    rows = read_json(ROOT / "benchmarks" / "records" / "frontier-smollm2.json")["rows"]
    chosen = next(row["config"] for row in rows if row["name"] == "budget-10")
    forms = {
        "softmax": None,
        "budget-0": darkformer.DarkConfig(),
        "budget-10": darkformer.DarkConfig.from_dict(chosen),
    }
    for name, config in forms.items():
        if (options.folder / name / "config.json").is_file():
            print(f"{name}: there already")
            continue
        model = load_model(source)
        if config is not None:
            darkformer.convert(model, config)
        model.to(torch.bfloat16).save_pretrained(options.folder / name)
        load_tokenizer(source).save_pretrained(options.folder / name)
        print(f"{name}: written to {options.folder / name}")


class Engine:
    """vLLM's engine in this process, one step at a time.

    Args:
        memory: bytes for keys, values and states.
    """

    def __init__(self, folder: Path, *, requests: int, memory: int, prefixes: bool, eager: bool) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from vllm import LLM

        self.engine = LLM(
            model=str(folder), dtype="bfloat16", max_model_len=POSITIONS, max_num_seqs=requests,
            max_num_batched_tokens=2048, kv_cache_memory_bytes=memory, enable_prefix_caching=prefixes,
            enforce_eager=eager, disable_log_stats=True,
        ).llm_engine  # fmt: skip
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.names, self.memory = 0, memory

    def add(self, tokens: list[int], new: int) -> str:
        from vllm import SamplingParams

        self.names += 1
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        self.engine.add_request(str(self.names), {"prompt_token_ids": tokens}, settings)
        return str(self.names)

    def step(self) -> dict[str, int]:
        """Tokens generated so far of each request that got any."""
        return {output.request_id: len(output.outputs[0].token_ids) for output in self.engine.step()}

    def bytes_in_use(self) -> int:
        config = self.scheduler.kv_cache_config
        pool = self.scheduler.kv_cache_manager.block_pool
        block = self.memory // config.num_blocks  # layers of several kinds share tensors, whose sizes do not add up
        return (config.num_blocks - 1 - pool.get_num_free_blocks()) * block  # one block is vLLM's own


def prompt(length: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 49000) for _ in range(length)]


def decode(engine: Engine, options: argparse.Namespace, length: int, requests: int) -> dict[str, Any]:
    """Tokens a second of `requests` requests that all decode, after prompts of `length`."""
    waiting = {engine.add(prompt(length, seed), ROOM) for seed in range(requests)}
    names, started, times = sorted(waiting), time.perf_counter(), []
    while waiting:
        waiting -= set(engine.step())
    prefill = time.perf_counter() - started
    for _ in range(options.steps + 2):
        before = time.perf_counter()
        reached = engine.step()
        times.append(time.perf_counter() - before)
        assert len(reached) == requests, f"{requests - len(reached)} of {requests} requests were not in the step"
    used = engine.bytes_in_use()
    engine.engine.abort_request(names)
    seconds = statistics.median(times[2:])
    return {
        "decode_tokens_per_second": requests / seconds,
        "seconds_a_step": seconds,
        "prefill_tokens_per_second": requests * length / prefill,
        "bytes_a_request": used // requests,
    }


def first_token(engine: Engine, tokens: list[int]) -> float:
    started = time.perf_counter()
    name = engine.add(tokens, 1)
    while name not in engine.step():
        pass
    return time.perf_counter() - started


def measure(options: argparse.Namespace, length: int, model: str, requests: list[int]) -> list[dict[str, Any]]:
    """Rows of one prompt length and model, in this process: one engine, whose start takes longer than they do."""
    most = max(requests)
    memory = min(int(1.1 * most * (length + ROOM) * SOFTMAX_BYTES) + 256 * MIB, options.memory * GIB)
    engine = Engine(options.folder / model, requests=most, memory=memory, prefixes=False, eager=options.eager)
    rows: list[dict[str, Any]] = []
    for number in requests:
        decode(engine, argparse.Namespace(steps=2), 32, number)  # threads and kernels come with the first calls
        row = {"model": model, "prompt": length, "requests": number, "memory_bytes": memory}
        rows.append(row | decode(engine, options, length, number))
    return rows


def measure_first(options: argparse.Namespace, lengths: list[int], model: str) -> list[dict[str, Any]]:
    """Time to the first token with and without a prefix that was read before."""
    engine = Engine(options.folder / model, requests=1, memory=2 * GIB, prefixes=True, eager=options.eager)
    first_token(engine, prompt(64, 9))
    rows: list[dict[str, Any]] = []
    for length in lengths:
        new, cached = [], []
        for seed in range(3):
            tokens = prompt(length, 1000 * length + seed)
            new.append(first_token(engine, tokens))
            cached.append(first_token(engine, [*tokens, *prompt(16, 100 + seed)]))
        rows.append({
            "model": model, "prompt": length, "requests": 0, "first_token_seconds": statistics.median(new),
            "first_token_seconds_cached": statistics.median(cached),
        })  # fmt: skip
    return rows


def run(options: argparse.Namespace, words: list[str]) -> None:
    settings = {name: getattr(options, name) for name in ("steps", "memory", "eager")}
    record: dict[str, Any] = {"benchmark": "serving", "settings": settings, "rows": [], "environment": environment()}
    if options.out.is_file():
        record = read_json(options.out)
        if record["settings"] != settings:
            sys.exit(f"{options.out} was made with {record['settings']}: repeat them, or choose another --out.")
    done = {(row["turn"], row["prompt"], row["requests"], row["model"]) for row in record["rows"]}
    # One process: all requests of a prompt, and the first tokens of all prompts.
    groups = [[(length, x) for x in options.requests] for length in options.prompts]
    groups.append([(length, 0) for length in options.prompts])
    for turn in range(options.turns):
        for group in groups:
            for model in MODELS:
                missing = [(length, x) for length, x in group if (turn, length, x, model) not in done]
                if not missing:
                    continue
                print(f"turn {turn + 1}, (prompt, requests) {missing}: {MODELS[model]}", flush=True)
                command = [sys.executable, __file__, *words, "--rows", model, *(f"{n}:{x}" for n, x in missing)]
                for row in _rows(command, [{"model": model, "prompt": n, "requests": x} for n, x in missing]):
                    record["rows"].append({"turn": turn, **row})
                    print(json.dumps(row), flush=True)
                write_json(options.out, record)
    print(table(record))


def _rows(command: list[str], names: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a process prints last; where it fails (memory), its last line."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return list(json.loads(done.stdout.splitlines()[-1]))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return [{**name, "error": lines[-1][-400:] if lines else f"exit {done.returncode}"} for name in names]


def medians(record: dict[str, Any], name: str) -> dict[tuple[int, int, str], float]:
    """Median over turns of a figure, by prompt, requests and model."""
    groups: dict[tuple[int, int, str], list[float]] = {}
    for row in record["rows"]:
        if name in row:
            groups.setdefault((row["prompt"], row["requests"], row["model"]), []).append(row[name])
    return {key: statistics.median(values) for key, values in groups.items()}


def table(record: dict[str, Any]) -> str:
    """Tokens a second and MiB a request, as markdown; in brackets how many times as fast as softmax."""
    speed, size = medians(record, "decode_tokens_per_second"), medians(record, "bytes_a_request")
    titles = list(MODELS.values())
    lines = [
        f"| prompt | requests | {' | '.join(f'{x}, tokens/s' for x in titles)} | "
        f"{' | '.join(f'{x}, MiB a request' for x in titles)} |",
        "|---:" * (2 + 2 * len(titles)) + "|",
    ]
    for length, requests in sorted({key[:2] for key in speed}):
        base, cells = speed.get((length, requests, "softmax")), [f"{length:,}", str(requests)]
        for model in MODELS:
            value = speed.get((length, requests, model))
            gain = "" if value is None or base is None or model == "softmax" else f" ({value / base:.1f}×)"
            cells.append("-" if value is None else f"{value:,.0f}{gain}")
        for model in MODELS:
            value = size.get((length, requests, model))
            cells.append("-" if value is None else f"{value / MIB:,.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    new, cached = medians(record, "first_token_seconds"), medians(record, "first_token_seconds_cached")
    if new:
        lines += ["", f"| prompt | {' | '.join(f'{x}, first token, s (prefix cached)' for x in titles)} |"]
        lines += ["|---:" * (1 + len(titles)) + "|"]
        for length in sorted({key[0] for key in new}):
            pairs = [(new.get((length, 0, model)), cached.get((length, 0, model))) for model in MODELS]
            cells = ["-" if a is None or b is None else f"{a:.2f} ({b:.2f})" for a, b in pairs]
            lines.append(f"| {length:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(record: dict[str, Any], path: Path) -> None:
    """Tokens a second against requests at once, a panel a prompt, and MiB a request against the prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from darkformer.plots import COLORS

    speed, size = medians(record, "decode_tokens_per_second"), medians(record, "bytes_a_request")
    lengths = sorted({key[0] for key in speed})
    figure, axes = plt.subplots(1, len(lengths) + 1, figsize=(4 * len(lengths) + 4, 3.6), constrained_layout=True)
    for (model, title), color in zip(MODELS.items(), (COLORS[0], COLORS[2], COLORS[4]), strict=True):
        for panel, length in zip(axes, lengths, strict=False):
            points = sorted((key[1], value) for key, value in speed.items() if key[0] == length and key[2] == model)
            panel.plot(*zip(*points, strict=True), marker="o", color=color, label=title)
        most = {length: max(key[1] for key in size if key[0] == length) for length in lengths}
        points = [(n, size[n, most[n], model] / MIB) for n in lengths if (n, most[n], model) in size]
        if points:
            axes[-1].plot(*zip(*points, strict=True), marker="o", color=color, label=title)
    for panel, length in zip(axes, lengths, strict=False):
        panel.set(title=f"after {length:,} tokens", xlabel="requests at once", xscale="log", yscale="log")
        panel.set_xticks(sorted({key[1] for key in speed}), [str(n) for n in sorted({key[1] for key in speed})])
    axes[0].set_ylabel("tokens a second")
    axes[-1].set(title="memory", xlabel="tokens of the prompt", ylabel="MiB a request", xscale="log", yscale="log")
    axes[-1].set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes[0].legend(frameon=False)
    for panel in axes:
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prepare", help="Write the models.")
    make.add_argument("folder", type=Path)
    draw = commands.add_parser("picture", help="Draw a record.")
    draw.add_argument("record", type=Path)
    draw.add_argument("path", type=Path)
    work = commands.add_parser("run", help="Measure.")
    work.add_argument("folder", type=Path, help="What `prepare` wrote.")
    work.add_argument("--out", type=Path, required=True, help="The record; rows that it has are not measured again.")
    work.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 7680], help="Tokens of the prompts.")
    work.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 128], help="Requests at once.")
    work.add_argument("--steps", type=int, default=24, help="Timed steps of a row.")
    work.add_argument("--turns", type=int, default=3, help="How often each row is measured.")
    work.add_argument("--memory", type=int, default=13, help="GiB at most for keys, values and states.")
    work.add_argument("--eager", action="store_true", help="Without torch.compile, for all models.")
    work.add_argument("--rows", nargs="+", help=argparse.SUPPRESS)  # model, then prompt:requests of each
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    options = parse(words)
    if options.command == "prepare":
        prepare(options)
    elif options.command == "picture":
        picture(read_json(options.record), options.path)
    elif options.rows:
        model, *texts = options.rows
        pairs = [(int(n), int(x)) for n, _, x in (text.partition(":") for text in texts)]
        if any(x for _, x in pairs):
            rows = measure(options, pairs[0][0], model, [x for _, x in pairs])
        else:
            rows = measure_first(options, [n for n, _ in pairs], model)
        print(json.dumps(rows))
    else:
        run(options, words)


if __name__ == "__main__":
    main(sys.argv[1:])
