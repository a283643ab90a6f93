"""`darkformer bench`: how fast each path is on this machine, from which length on, and how near to what is possible.

Points that are compared with each other are measured in turns and written to the record at once, so that an interrupted
sweep continues. A path whose parity check fails is not measured: a wrong answer has no speed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path as File
from typing import Any, NamedTuple

import torch

from ..cost import Work, linear_attention_work, softmax_attention_work, times_as_fast
from ..errors import RunFolderError
from ..ops import native
from ..ops.native import Step
from ..records import as_written, check_folder, environment, read_json, write_json
from ..reporting import Reporter
from .bench_machine import EMULATED, highest, limits, measure_in_turns, peak_scratch
from .bench_model import model_points
from .bench_paths import PEERS, SOFTMAX, Call, Path, Shape, own_paths, parity, why_not

WIDE = Shape("8 heads, d 64, m 128", 8, 8, 64, 128, 0)
GEMMA = Shape("Gemma: 4 heads, 1 kv, d 256, m 256", 4, 1, 256, 256, 0)


class Sweep(NamedTuple):
    """Every combination of its fields is a point."""

    shapes: tuple[Shape, ...]
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    directions: tuple[str, ...] = ("forward", "forward+backward")
    peers: bool = False


class Plan(NamedTuple):
    """What to measure and how long."""

    name: str
    sweeps: tuple[Sweep, ...]
    seconds: float  # of repetitions a point
    decode: tuple[int, ...]  # lengths of the history
    model: bool  # end to end on SmolLM2-135M


def full_plan() -> Plan:
    """About twenty minutes on two cores; a third of it is softmax at 64k."""
    windowed = WIDE._replace(window=64)
    few = ("float32",)
    return Plan(
        "full",
        (
            Sweep((WIDE, windowed), (512, 1024, 2048, 4096, 8192, 16384)),
            Sweep((WIDE, windowed), (65536,)),
            Sweep((WIDE,), (1024, 4096), few, peers=True),
            Sweep((WIDE,), (16384,), few, ("forward+backward",), peers=True),
            Sweep((GEMMA, GEMMA._replace(window=64)), (2048, 8192)),
            Sweep(tuple(WIDE._replace(name=f"m {m}", features=m) for m in (64, 256)), (8192,), few),
            Sweep(tuple(WIDE._replace(name=f"{g} kv heads", kv_heads=g) for g in (1, 2)), (8192,), few),
        ),
        seconds=1.5,
        decode=(1024, 8192, 65536),
        model=True,
    )


def quick_plan() -> Plan:
    """Under a minute: where is the crossover on this machine?"""
    shapes = (WIDE, WIDE._replace(window=64))
    return Plan("quick", (Sweep(shapes, (256, 512, 1024, 2048, 4096), ("float32",)),), 0.25, (4096,), False)


class Point(NamedTuple):
    """What is measured: a path on an operator."""

    path: Path
    shape: Shape
    length: int
    dtype: str
    direction: str

    def name(self) -> dict[str, Any]:
        """As it stands in the record."""
        return self._asdict() | {"path": self.path.name, "shape": self.shape._asdict()}


def _work(path: Path, shape: Shape, length: int, dtype: str, backward: bool) -> Work:
    sizes: dict[str, Any] = dict(num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.dim)
    sizes |= dict(element_bytes=4 if dtype == "float32" else 2, backward=backward)
    if path.name == SOFTMAX.name:
        return softmax_attention_work(length, **sizes)
    return linear_attention_work(length, num_features=shape.features, window=shape.window, **sizes)


def measure_group(points: Sequence[Point], seconds: float, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of the record for each point: times taken in turns, peak scratch memory, work, share of the lower bound.

    Args:
        points: of one group.
        machine: its limits at that time, for the bound.
    """
    shape, length, dtype = points[0].shape, points[0].length, points[0].dtype
    backward = points[0].direction != "forward"
    inputs = shape.inputs(length, dtype, grad=backward)
    cotangent = torch.ones(1, shape.heads, length, shape.dim, dtype=inputs[0].dtype)

    def task(call: Call) -> Callable[[], None]:
        def run() -> None:
            if not backward:
                with torch.no_grad():
                    call(*inputs)
                return
            for x in inputs:
                x.grad = None
            call(*inputs).backward(cotangent)

        return run

    tasks = [task(point.path.make(point.shape)) for point in points]
    timings = measure_in_turns(tasks, seconds=seconds)
    known = cotangent.nbytes + (sum(x.nbytes for x in inputs) if backward else 0)
    rates = [machine["gemm_flops"][dtype], machine["exps_per_second"], machine["bytes_per_second"]]
    rows = []
    for point, run, timing in zip(points, tasks, timings, strict=True):
        for x in inputs:
            x.grad = None
        scratch = None if timing["median"] > 20 else peak_scratch(run, known)  # not twice what takes so long
        work = _work(point.path, point.shape, length, dtype, backward)
        bound = work.seconds(*rates)
        rows.append(point.name() | timing | {
            "peak_scratch_bytes": scratch, "work": work._asdict(), "limits": rates, "bound_seconds": bound,
            "fraction_of_bound": bound / timing["median"],
        })  # fmt: skip
    return rows


def decode_points(length: int, seconds: float) -> list[dict[str, Any]]:
    """Seconds a token after `length` tokens, 8 heads, in turns.

    Paths: `recurrent` (torch, through `attention`), `step` (compiled, in place, where there is a compiler) and `sdpa`,
    softmax over a cache of that length.
    """
    from ..ops.attention import attention

    shape = WIDE._replace(window=64)
    q, k, v = shape.inputs(1, "float32")
    past, made, history = torch.randn(2, 1, 8, length + 1, 64), shape.feature_map(), shape.inputs(8192, "float32")
    past_q, past_k, past_v = (x[:, :, : min(length, 8192)] for x in history)
    with torch.no_grad():  # the state's size and cost do not depend on the history
        state: Any = attention(past_q, past_k, past_v, made, return_state=True)[1]
        calls: dict[str, Callable[[], Any]] = {
            "recurrent": lambda: attention(q, k, v, made, initial_state=state, return_state=True),
            "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, past[0], past[1]),
        }
        if native.unavailable() is None:
            calls["step"] = partial(Step(state, made, scaling=shape.dim**-0.5, softcap=None), q, k, v)
        timings = measure_in_turns(list(calls.values()), seconds=seconds, most=200)
    return [{"path": name, "length": length, **timing} for name, timing in zip(calls, timings, strict=True)]


def _groups(plan: Plan, dtypes: Sequence[str]) -> list[list[Point]]:
    """All points once, those that are compared with each other together: same heads, d, length, dtype and direction."""
    groups: dict[tuple[Any, ...], dict[Any, Point]] = {}
    for sweep in plan.sweeps:
        paths = [SOFTMAX, *own_paths(), *(PEERS if sweep.peers else ())]
        for shape, dtype, length, direction in itertools.product(
            sweep.shapes, sweep.dtypes, sweep.lengths, sweep.directions
        ):
            if dtype not in dtypes:
                continue
            group = groups.setdefault((shape.heads, shape.kv_heads, shape.dim, length, dtype, direction), {})
            for path in paths:
                # Softmax has neither features nor a window.
                key = path.name if path is SOFTMAX else (path.name, shape)
                if length <= path.longest:
                    group.setdefault(key, Point(path, shape, length, dtype, direction))
    return [list(group.values()) for group in groups.values()]


def crossover(rows: Iterable[dict[str, Any]], path: str) -> float | None:
    """Length from which on `path` stays faster than softmax, by straight lines between the points (log-log).

    Args:
        rows: of one shape, dtype and direction; the softmax rows among them.

    Returns:
        None if it is not faster at the longest length; the shortest length measured if it is faster everywhere.
    """
    rows = list(rows)
    softmax = {row["length"]: row for row in rows if row["path"] == SOFTMAX.name}
    ours = {row["length"]: row for row in rows if row["path"] == path}
    lengths = sorted(softmax.keys() & ours.keys())
    gains = [math.log(times_as_fast(ours[n], softmax[n])) for n in lengths]
    if not gains or gains[-1] < 0:
        return None
    for i in range(len(lengths) - 1, 0, -1):
        if gains[i - 1] < 0:
            share = gains[i - 1] / (gains[i - 1] - gains[i])
            return float(lengths[i - 1] * (lengths[i] / lengths[i - 1]) ** share)
    return float(lengths[0])


def families(points: Sequence[dict[str, Any]]) -> Iterator[tuple[Shape, str, str, list[dict[str, Any]]]]:
    """The rows of each (shape, dtype, direction), with the softmax rows of the same heads, which have no window."""
    seen = []
    for row in points:
        shape = Shape(**row["shape"])
        if row["path"] != SOFTMAX.name and (shape, row["dtype"], row["direction"]) not in seen:
            seen.append((shape, row["dtype"], row["direction"]))
    for shape, dtype, direction in seen:
        plain = (shape.heads, shape.kv_heads, shape.dim)
        chosen = [
            row for row in points
            if (row["dtype"], row["direction"]) == (dtype, direction)
            and ((Shape(**row["shape"]) == shape and row["path"] != SOFTMAX.name)
                 or (row["path"] == SOFTMAX.name and Shape(**row["shape"])[1:4] == plain))
        ]  # fmt: skip
        yield shape, dtype, direction, chosen


class Bench:
    """A sweep that writes its record as it goes."""

    def __init__(self, plan: Plan, out: File, reporter: Reporter, *, overwrite: bool = False) -> None:
        self.plan, self.file, self.reporter = plan, out / "record.json", reporter
        check_folder(out)
        here = environment()
        if self.file.is_file() and not overwrite:
            self.record = read_json(self.file)
            with as_written(self.file):
                before = self.record["environment"]
                for name in ("commit", "device", "threads"):
                    if before[name] != here[name] or self.record["plan"] != plan.name:
                        raise RunFolderError(
                            f"{out} holds a benchmark ({self.record['plan']}, {name} {before[name]!r}; now "
                            f"{plan.name}, {here[name]!r}): --overwrite replaces it, --out avoids it."
                        )
            return
        self.record = {
            "benchmark": "attention", "plan": plan.name, "finished": False, "environment": here,
            "seconds_a_point": plan.seconds, "limits": None, "parity": [], "points": [], "decode": [], "model": [],
        }  # fmt: skip

    def _save(self) -> None:
        write_json(self.file, self.record)

    def run(self) -> dict[str, Any]:
        """The finished record."""
        record, plan = self.record, self.plan
        if record["limits"] is None:
            with self.reporter.stage("limits of this machine", 1):
                record["limits"] = limits(min(plan.seconds, 0.3))
            self._save()
        dtypes = self._dtypes()
        if "bfloat16" not in dtypes and any("bfloat16" in sweep.dtypes for sweep in plan.sweeps):
            rates = record["limits"]["gemm_flops"]
            self.reporter.say(
                f"bfloat16 is left out: this machine emulates it ({rates['bfloat16'] / 1e9:.1f} GFLOP/s, float32 "
                f"{rates['float32'] / 1e9:.0f})."
            )
        groups = _groups(plan, dtypes)
        total, done = sum(map(len, groups)), 0
        with self.reporter.stage(f"{total} points", total) as advance:
            for group in groups:
                self._measure(group)
                done += len(group)
                advance(done, total)
        lengths = [n for n in plan.decode if n not in {row["length"] for row in record["decode"]}]
        if lengths:
            self._decode(lengths)
        if plan.model and not record["model"]:
            record["model"] = model_points(self.reporter, dtypes[-1])
        record["crossover"] = [
            {"shape": shape._asdict(), "dtype": dtype, "direction": direction, "path": name,
             "tokens": crossover(rows, name)}
            for shape, dtype, direction, rows in families(record["points"])
            for name in dict.fromkeys(row["path"] for row in rows if row["path"] != SOFTMAX.name)
        ]  # fmt: skip
        record["finished"] = True
        self._save()
        return record

    def _decode(self, lengths: Sequence[int]) -> None:
        with self.reporter.stage("decode", len(lengths)) as advance:
            for done, length in enumerate(lengths, 1):
                self.record["decode"] += decode_points(length, self.plan.seconds)
                self._save()
                advance(done, len(lengths))

    def _dtypes(self) -> list[str]:
        """What this machine multiplies, the fastest last."""
        rates = self.record["limits"]["gemm_flops"]
        return ["float32", *(["bfloat16"] if rates["bfloat16"] >= EMULATED * rates["float32"] else [])]

    def _measure(self, group: list[Point]) -> None:
        """Measures what the record lacks of a group, after the machine's limits: its speed changes within minutes."""
        record = self.record
        had = [{name: row[name] for name in Point._fields} for row in record["points"]]
        missing = [point for point in group if point.name() not in had and self._admitted(point)]
        if missing:
            now = limits(min(self.plan.seconds, 0.1), (missing[0].dtype,))
            record["limits"] = highest(record["limits"], now)
            record["points"] += measure_group(missing, self.plan.seconds, now)
            self._save()

    def _admitted(self, point: Point) -> bool:
        """Whether the path runs here and is right; asked once a (path, shape, dtype) and recorded with its errors."""
        path, shape, dtype = point.path, point.shape, point.dtype
        name = {"path": path.name, "shape": shape._asdict(), "dtype": dtype}
        for row in self.record["parity"]:
            if all(row[key] == value for key, value in name.items()):
                return row["passed"] is not False
        reason = why_not(path, shape, dtype)
        failed: dict[str, Any] = {"passed": False, "errors": {}, "allowed": {}}
        result = failed if reason else parity(path, shape, dtype)
        self.record["parity"].append(name | result | {"why_not": reason})
        self._save()
        if result["passed"] is False:
            said = reason or ", ".join(f"{k} {e:.1e} > {result['allowed'][k]:.1e}" for k, e in result["errors"].items()
                                       if e > result["allowed"][k])  # fmt: skip
            self.reporter.say(f"not reported: {path.name}, {shape.name}, W {shape.window}, {dtype}: {said}")
        return result["passed"] is not False
