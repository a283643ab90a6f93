"""`darkformer bench`: what is refused, what the record holds, how it continues. No time is asserted."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from darkformer import DarkConfig, attention, feature_map, plots
from darkformer.cli import app
from darkformer.cli.bench import print_bench
from darkformer.cost import linear_attention_work, softmax_attention_work, times_as_fast
from darkformer.errors import RunFolderError
from darkformer.ops import attention as door
from darkformer.ops import native
from darkformer.reporting import Silent
from darkformer.research import bench, bench_machine, bench_model, bench_paths
from darkformer.research.bench import Bench, Plan, Sweep, crossover
from darkformer.research.bench_paths import SOFTMAX, Shape, parity
from darkformer.research.bench_targets import AIMS, targets_markdown

TINY = Shape("tiny", 2, 1, 16, 8, 0)
PLAN = Plan("tiny", (Sweep((TINY, TINY._replace(window=4)), (64, 96), ("float32",)),), 0.0, (64,), False)


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_machine, "PRODUCTS", ((1, 16, 16, 16),))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return Bench(PLAN, tmp_path_factory.mktemp("bench"), Silent()).run()


def test_the_record_says_all_there_is_to_know(record: dict) -> None:
    assert record["finished"] and record["environment"]["threads"] == torch.get_num_threads()
    assert {"commit", "versions", "device"} <= record["environment"].keys()
    paths = [path.name for path in bench_paths.own_paths()]
    assert "chunked" in paths
    # Softmax has no window, so it is measured once.
    assert len(record["points"]) == 2 * 2 * (1 + 2 * len(paths))
    for row in record["points"]:
        assert row["median"] > 0 and row["iqr"] >= 0 and row["runs"] >= 1
        assert row["peak_scratch_bytes"] is None or row["peak_scratch_bytes"] >= 0
        assert row["fraction_of_bound"] == pytest.approx(row["bound_seconds"] / row["median"])
        flops, exps, copied = row["limits"]  # of that moment
        best = record["limits"]
        assert 0 < flops <= best["gemm_flops"][row["dtype"]]
        assert 0 < exps <= best["exps_per_second"] and 0 < copied <= best["bytes_per_second"]
        work = row["work"]
        assert row["bound_seconds"] == max(work["flops"] / flops + work["exps"] / exps, work["bytes"] / copied)
    assert all(row["passed"] for row in record["parity"])
    steps = {"step"} if native.unavailable() is None else set()
    assert {row["path"] for row in record["decode"]} == {"recurrent", "sdpa"} | steps
    assert len(record["crossover"]) == 2 * 2 * len(paths)
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_a_wrong_backend_is_refused(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by 1e-4 of its own: in the values, or in the gradients alone."""
    right = door.BACKENDS["chunked"].function

    def broken(problem: door.Problem) -> tuple[Tensor, door.AttentionState]:
        output, state = right(problem)
        if wrong == "output":
            return output * (1 + 1e-4), state
        return output + 1e-4 * (output - output.detach()), state

    monkeypatch.setitem(door.BACKENDS, "chunked", door.BACKENDS["chunked"]._replace(function=broken))
    monkeypatch.setattr(bench, "own_paths", lambda: [p for p in bench_paths.own_paths() if p.name == "chunked"])
    lines = Lines()
    found = Bench(PLAN, tmp_path, lines).run()
    assert {row["path"] for row in found["points"]} == {"sdpa"} and not found["crossover"]
    refused = [row for row in found["parity"] if row["passed"] is False]
    assert {row["path"] for row in refused} == {"chunked"}
    assert any("not reported: chunked" in line and "1.0e-04 > 5.0e-06" in line for line in lines.lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_paths_pass(dtype: str) -> None:
    for path in [SOFTMAX, *bench_paths.own_paths()]:
        result = parity(path, TINY._replace(window=4), dtype)
        assert result["passed"], (path.name, result)


def test_a_missing_peer_says_why() -> None:
    peer = bench_paths.Path("nothing", lambda shape: __import__("no_such_package"), peer=True)
    assert "no_such_package" in (bench_paths.why_not(peer, TINY, "float32") or "")


def test_an_interrupted_sweep_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    whole = bench.measure_group

    def counted(points: list[bench.Point], *arguments: Any) -> list[dict]:
        calls.append(len(points))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(points, *arguments)

    monkeypatch.setattr(bench, "measure_group", counted)
    with pytest.raises(KeyboardInterrupt):
        Bench(PLAN, tmp_path, Silent()).run()
    assert len(json.loads((tmp_path / "record.json").read_text())["points"]) == sum(calls[:2])
    found = Bench(PLAN, tmp_path, Silent()).run()
    assert found["finished"] and len(found["points"]) == sum(calls) - calls[2]
    before = len(calls)
    Bench(PLAN, tmp_path, Silent()).run()  # a finished one is only shown again
    assert len(calls) == before
    with pytest.raises(RunFolderError, match="--overwrite"):
        Bench(PLAN._replace(name="other"), tmp_path, Silent())


def test_calls_take_turns() -> None:
    order: list[str] = []
    rows = bench_machine.measure_in_turns([lambda: order.append("a"), lambda: order.append("b")], seconds=0.0)
    assert "".join(order) == "ab" + "ab" * 7  # after one warm-up each
    assert [r["runs"] for r in rows] == [len(r["turns"]) for r in rows] == [7, 7]
    order.clear()
    rows = bench_machine.measure_in_turns([lambda: order.append("a"), lambda: order.append("b")], seconds=1.0, most=14)
    assert "".join(order) == "ab" + "aabb" * 7 and [r["runs"] for r in rows] == [14, 14]


def test_a_ratio_is_that_of_the_turns() -> None:
    """The second half of the turns is three times as slow, for both; so the ratio stays what it is."""
    ours = {"median": 3.0, "turns": [1.0, 1.0, 3.0, 3.0, 3.0]}
    theirs = {"median": 8.0, "turns": [8.0, 8.0, 24.0, 24.0, 24.0]}
    assert times_as_fast(ours, theirs) == 8
    assert times_as_fast(ours, {"median": 30.0, "turns": [30.0]}) == 10  # not repeated
    assert times_as_fast({"median": 2.0}, {"median": 8.0}) == 4  # a record without turns


def test_what_is_compared_is_measured_together() -> None:
    """Softmax once a length, in one group with every operator and peer of the same heads."""
    groups = bench._groups(bench.full_plan(), ["float32", "bfloat16"])
    points = [point for group in groups for point in group]
    assert len(set(points)) == len(points)
    for group in groups:
        assert sum(point.path is SOFTMAX for point in group) == 1
        assert len({(p.shape.heads, p.shape.kv_heads, p.shape.dim, *p[2:]) for p in group}) == 1
    at_4k = next(group for group in groups if group[0].length == 4096 and group[0].dtype == "float32")
    assert {path.name for path in bench_paths.PEERS} < {point.path.name for point in at_4k}
    assert {point.shape.window for point in at_4k} == {0, 64}


def row(path: str, length: int, median: float) -> dict:
    return {"path": path, "length": length, "median": median}


def test_crossover() -> None:
    quadratic = [row("sdpa", n, n * n / 1024) for n in (256, 1024, 4096)]
    assert crossover([*quadratic, *(row("x", n, n) for n in (256, 1024, 4096))], "x") == pytest.approx(1024)
    late = [row("x", n, 2.0 * n) for n in (256, 1024, 4096)]
    assert crossover([*quadratic, *late], "x") == pytest.approx(2048)
    assert crossover([*quadratic, *(row("x", n, 1e-3) for n in (256, 1024))], "x") == 256
    assert crossover([*quadratic, *(row("x", n, 1e9) for n in (256, 1024))], "x") is None
    assert crossover(quadratic, "x") is None


def test_work_is_what_the_formulas_say() -> None:
    sizes = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
    work = linear_attention_work(1000, num_features=128, window=0, **sizes)
    token = 4 * 64 * 128 + 4 * 64 * 128 + 33 * (128 + 64) + 2 * 128
    assert work.flops == 8000 * token and work.exps == 8000 * 256 and work.bytes == 4 * 4 * 64 * 8000
    assert work.seconds(1e9, math.inf, math.inf) == work.flops / 1e9
    assert work.seconds(math.inf, math.inf, 1e9) == work.bytes / 1e9
    for backward in (False, True):
        short, long = (linear_attention_work(n, num_features=128, window=64, backward=backward, **sizes)
                       for n in (4096, 8192))  # fmt: skip
        assert long.flops == 2 * short.flops
        short, long = (softmax_attention_work(n, backward=backward, **sizes) for n in (4096, 8192))
        assert 3.99 < long.flops / short.flops < 4


def test_tables_and_plots_come_from_the_record(record: dict, tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    print_bench(record, console)
    text = console.export_text()
    assert "crossover with softmax" in text and "× softmax" in text and "GFLOP/s" in text
    for draw in (plots.time_against_length, plots.speed_up_against_length):
        assert draw(record, tmp_path / f"{draw.__name__}.png").stat().st_size > 5000


def synthetic(speed: float) -> dict:
    """A full record in which every path of ours is `speed` times as fast as softmax at 4k, and linear."""
    points = []
    for sweep in bench.full_plan().sweeps:
        for shape in sweep.shapes:
            for dtype, direction, length in itertools.product(sweep.dtypes, sweep.directions, sweep.lengths):
                paths = ["native", "chunked", *(p.name for p in bench_paths.PEERS if sweep.peers)]
                for path in [*paths, *([] if shape.window else ["sdpa"])]:
                    median = (length / 4096) ** 2 if path == "sdpa" else length / 4096 / speed
                    median *= 100 if path in [p.name for p in bench_paths.PEERS] else 1
                    points.append({"shape": shape._asdict(), "length": length, "dtype": dtype, "direction": direction,
                                   "path": path, "median": median, "fraction_of_bound": 0.5,
                                   "peak_scratch_bytes": 20_000_000})  # fmt: skip
    parity = [{"path": "native", "dtype": dtype, "errors": {"output": e}, "allowed": {"output": 1.3 * e}}
              for dtype, e in (("float32", 1e-6), ("bfloat16", 1e-3))]  # fmt: skip
    crossing = [{"shape": bench.WIDE._asdict(), "dtype": a.dtype, "direction": a.direction, "path": a.path,
                 "tokens": 700.0} for a in AIMS]  # fmt: skip
    tasks = ("prefill", "training step", "generation, one token")
    model = [{"task": task, "model": name, "dtype": "bfloat16", "median": median}
             for task in tasks for name, median in (("softmax", 2.0), ("linear", 1.0))]  # fmt: skip
    return {"points": points, "parity": parity, "crossover": crossing, "model": model, "decode": [],
            "limits": {"gemm_flops": {"float32": 1e11, "bfloat16": 2e11}},
            "environment": {"device": "a machine", "threads": 2, "commit": "abc"}}  # fmt: skip


def test_the_targets_beside_what_was_measured() -> None:
    text = targets_markdown(synthetic(8.0))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    # 8 at 4k, 16 at 8k, 32, 128: all but the aim 10 at 4k of one row
    forward = next(x for x in text.splitlines() if "`native` forward, W 0 | float32" in x)
    assert (
        "**8.0** (8) | **16.0** (14) | **32.0** (27) | **128.0** (95) | 0.50 (0.80) | 0.42 |" in forward
    )  # 27 of 32 times
    backward = next(x for x in text.splitlines() if "`native` forward+backward, W 0 | bfloat16" in x)
    assert "| 8.0 (10) |" in backward and "**0.50** (0.40)" in backward
    assert "(5.6)" in next(x for x in text.splitlines() if "`native` forward, W 64 | float32" in x)
    assert lines["crossover, `native` forward, float32"].endswith("| 700 tokens | ✗ |")
    assert lines["crossover, `chunked` forward, float32"].endswith("| 700 tokens | ✓ |")
    assert "| 100× | ✓ |" in lines["`native` against performer-pytorch, forward at 4k"]
    assert "| 20 MB | ✗ |" in lines["scratch memory at 64k, `native`, at worst (both windows and dtypes)"]
    assert "| 20 MB | ✓ |" in lines["scratch memory at 64k, `chunked`, at worst (both windows and dtypes)"]
    assert "| 1.00 | ✓ |" in lines["slope of time 4k–64k, `native` forward, float32"]
    assert "| 1.0 | ✓ |" in lines["worst error of `native`, float32 (× 10⁻⁶)"]
    assert "| 1.00× | ✓ |" in lines["worst error of `native`, bfloat16, of softmax's own"]
    assert "| 16× | ✓ |" in lines["Gemma's shape at 8k, forward+backward, bfloat16"]
    assert "| 2× | ✗ |" in lines["SmolLM2-135M, bfloat16: prefill at 8k"]


def test_every_target_has_its_points_in_the_full_plan() -> None:
    assert "–" not in targets_markdown(synthetic(8.0)).replace("4k–64k", "")
    nothing = targets_markdown(synthetic(8.0) | {"points": [], "parity": [], "crossover": [], "model": []})
    assert "✓" not in nothing and "✗" not in nothing and "**" not in nothing


def test_the_machine_is_as_fast_as_it_was_at_its_best() -> None:
    before = {"gemm_flops": {"float32": 3.0, "bfloat16": 9.0}, "exps_per_second": 2.0}
    now = {"gemm_flops": {"float32": 4.0}, "exps_per_second": 1.0}
    assert bench_machine.highest(before, now) == {
        "gemm_flops": {"float32": 4.0, "bfloat16": 9.0},
        "exps_per_second": 2.0,
    }


def test_emulated_bfloat16_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"gemm_flops": {"float32": 1e11, "bfloat16": 1e9}, "exps_per_second": 1e9, "bytes_per_second": 1e10}
    monkeypatch.setattr(bench, "limits", lambda *_: rates)
    asked: list[str] = []
    monkeypatch.setattr(bench, "model_points", lambda reporter, dtype: asked.append(dtype) or [])
    plan = Plan("tiny", (Sweep((TINY,), (64,)),), 0.0, (), True)
    lines = Lines()
    found = Bench(plan, tmp_path / "slow", lines).run()
    assert {row["dtype"] for row in found["points"]} == {"float32"} and asked == ["float32"]
    assert any("bfloat16 is left out: this machine emulates it (1.0 GFLOP/s, float32 100)" in x for x in lines.lines)
    rates["gemm_flops"] = {"float32": 1e11, "bfloat16": 2e11}
    found = Bench(plan, tmp_path / "fast", Silent()).run()
    assert {row["dtype"] for row in found["points"]} == {"float32", "bfloat16"} and asked[1:] == ["bfloat16"]


def test_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb, on tiny sizes: the crossover is said, record and plots are there; a second call repeats nothing."""
    assert {direction for sweep in bench.quick_plan().sweeps for direction in sweep.directions} >= {"forward"}
    assert not bench.quick_plan().model
    monkeypatch.setattr(bench, "quick_plan", lambda: PLAN)
    words = ["bench", "--quick", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, words, catch_exceptions=False)
    assert first.exit_code == 0 and "crossover with softmax" in first.output
    assert {path.name for path in tmp_path.iterdir()} == {"record.json", "time.png", "speedup.png"}
    monkeypatch.setattr(bench, "measure_group", None)
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0


def test_end_to_end_tasks(model_folder: Path) -> None:
    from darkformer import DarkConfig, convert, load_model

    models = {name: load_model(str(model_folder)) for name in ("softmax", "linear")}
    convert(models["linear"], DarkConfig(num_features=8, window=4, sinks=1))
    rows = bench_model.tasks(models, 40, 24, {"softmax": 12, "linear": 16})
    assert [(r["task"], r["model"], r["tokens"]) for r in rows] == [
        ("prefill", "softmax", 40), ("prefill", "linear", 40),
        ("generation, one token", "softmax", 12), ("generation, one token", "linear", 16),
        ("training step", "softmax", 24), ("training step", "linear", 24),
    ]  # fmt: skip
    assert all(r["median"] > 0 and r["runs"] >= 3 for r in rows)
    assert all(p.grad is None for model in models.values() for p in model.parameters())


def test_scratch_memory_is_seen() -> None:
    held: list[Tensor] = []
    found = bench_machine.peak_scratch(lambda: held.append(torch.ones(8 << 20) + 1), known=32 << 20)
    if found is None:
        pytest.skip("the system does not tell")
    assert 24 << 20 < found < 48 << 20  # two tensors of 32 MiB at once, one of them known


@pytest.mark.skipif(native.unavailable() is not None, reason="the compiled backend is not available")
def test_memory_kept_between_calls_is_seen_in_every_call() -> None:
    made = feature_map(DarkConfig.paper(128), num_heads=2, num_kv_heads=2, head_dim=64)
    inputs = [torch.randn(1, 2, 4096, 64, requires_grad=True) for _ in range(3)]
    cotangent = torch.ones(1, 2, 4096, 64)

    def call() -> None:
        attention(*inputs, made, backend="native").backward(cotangent)

    found = []
    for _ in range(4):
        for x in inputs:
            x.grad = None
        found.append(bench_machine.peak_scratch(call, known=4 * cotangent.nbytes))
    if found[0] is None:
        pytest.skip("the system does not tell")
    assert max(found[1:]) > 5e6, found  # the features alone are more
