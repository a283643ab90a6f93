"""The experiment, job by job: a record file each, so that a killed run continues behind the last one."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...records import environment, open_run
from ...reporting import Advance, Reporter
from ..reproduce.records import read_lines, write_lines
from . import report
from .convergence import distances
from .kernels import AdamLike, _relu, tangent_kernels
from .networks import initial, train
from .plan import FINITE, RIDGES, Job, Plan, Setting
from .tasks import TASKS, Task

#: How often a network is scored on the inputs that choose when to stop.
LOOKS = 24
#: Units drawn to see which of them a kernel's solution rests on, and the share of them that counts as the nearest.
SELECTION_UNITS, NEAREST = 20_000, 0.01


def generator_of(*parts: Any) -> torch.Generator:
    """A stream of its own for every purpose, the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32(repr(parts).encode()))


def ridge_regression(kernel: Tensor, task: Task) -> tuple[dict[str, float], Tensor]:
    """Kernel ridge regression, its ridge chosen on the inputs set aside for it.

    Args:
        kernel: (N, n), columns: the inputs trained on.

    Returns:
        Scores and the ridge; the dual coefficients (n, C).
    """
    from sklearn.kernel_ridge import KernelRidge

    kernel = kernel.double() / kernel[task.train].diagonal().mean()
    best: tuple[float, float, Any] | None = None
    for ridge in RIDGES:
        model = KernelRidge(alpha=ridge, kernel="precomputed")
        model.fit(kernel[task.train].numpy(), task.y[task.train].double().numpy())
        valid = task.score(torch.from_numpy(model.predict(kernel[task.valid].numpy())), task.valid)
        if best is None or valid > best[0]:
            best = valid, ridge, model
    assert best is not None
    valid, ridge, model = best
    test = task.score(torch.from_numpy(model.predict(kernel[task.test].numpy())), task.test)
    return {"score": test, "valid": valid, "choice": ridge}, torch.from_numpy(model.dual_coef_).float()


def selection(task: Task, other: Task, dual: Tensor, adam_like: bool, generator: torch.Generator) -> dict[str, float]:
    """How much more a kernel's solution moves the hidden units that resemble the target's than the others.

    The output weight of unit w moves by Σ_x c_x φ(w·x) D(w); times the root mean square of φ(w·x) it is the part of
    the function that the unit carries. `nearest` is the mean part of the `NEAREST` units, by correlation over the
    inputs with any of the target's units, over the mean of all; `control` the same for the units of `other`.
    """
    assert task.teachers is not None and other.teachers is not None
    x = task.x[task.train]
    activation = _relu(x @ torch.randn(x.shape[1], SELECTION_UNITS, generator=generator))
    size = activation.square().mean(0).sqrt()
    part = (dual.mT @ activation).norm(dim=0) * (size.sqrt() if adam_like else size)

    def standard(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        return z / z.norm(dim=0).clamp_min(torch.finfo(z.dtype).tiny)

    def ratio(teachers: Tensor) -> float:
        correlation = standard(_relu(x @ teachers.mT)).mT @ standard(activation)
        nearest = correlation.amax(0).topk(int(NEAREST * SELECTION_UNITS)).indices
        return float(part[nearest].mean() / part.mean())

    return {"nearest": ratio(task.teachers), "control": ratio(other.teachers)}


class Experiment:
    """Runs a plan in one folder."""

    def __init__(self, plan: Plan, out: Path, reporter: Reporter) -> None:
        self.plan, self.out, self.reporter = plan, out, reporter

    def _file(self, job: Job) -> Path:
        return self.out / "stages" / f"{job.name}.jsonl"

    def table(self) -> list[list[str]]:
        """The plan: header, then a row a setting with its seeds and those of them that are left."""
        rows = [["task", "hidden layers", "seeds", "left"]]
        jobs = self.plan.jobs()
        for kind in dict.fromkeys((job.setting, job.depth) for job in jobs):
            own = [job for job in jobs if (job.setting, job.depth) == kind]
            left = sum(not read_lines(self._file(job)) for job in own)
            task = "distance to the limit" if kind[0] is None else kind[0].task
            rows.append([task, str(kind[1]), str(len(own)), str(left)])
        return rows

    def run(self, *, resume: bool = False, overwrite: bool = False) -> dict[str, list[list[str]]]:
        """All that is left of the plan; then record, tables and picture. Returns the tables.

        Raises:
            DarkformerError: a folder with another run, too little text, scikit-learn is missing.
        """
        if open_run(self.out, self.plan.described(), resume=resume, overwrite=overwrite):
            self.reporter.say(f"continuing the run in {self.out}")
        jobs = self.plan.jobs()
        for i, job in enumerate(jobs):
            if read_lines(self._file(job)):
                continue
            started = time.perf_counter()
            with self.reporter.stage(f"[{i + 1}/{len(jobs)}] {job.name}", 100) as advance:
                rows = self._done(job, advance)
            seconds = round(time.perf_counter() - started, 1)
            write_lines(self._file(job), [{"job": job.name, "seconds": seconds, **row} for row in rows])
        lines = [line for job in jobs for line in read_lines(self._file(job))]
        write_lines(report.record_file(self.out), [*lines, {"kind": "run", "environment": environment()}])
        return report.draw(self.out)

    def _done(self, job: Job, advance: Advance) -> list[dict[str, Any]]:
        if job.setting is None:
            return distances(self.plan, job.depth, advance)
        return self._scores(job.setting, job.seed, advance)

    def _scores(self, setting: Setting, seed: int, advance: Advance) -> list[dict[str, Any]]:
        task = self._task(setting, "split", seed)
        common = {"task": setting.task, "depth": setting.depth, "seed": seed}
        rows, steps = [], 1 + sum(len(self._rates(setting, seed, model)) for model in FINITE)
        for model, kernel in self._limits(task, setting, seed).items():
            scores, dual = ridge_regression(kernel, task)
            rows.append({"kind": "score", **common, "model": model, **scores})
            if task.teachers is not None:
                other = self._task(setting, "control", seed)
                found = selection(task, other, dual, model == "adam-like", generator_of("selection", seed))
                rows.append({"kind": "selection", **common, "model": model, **found})
        done = 1
        advance(100 * done // steps, 100)
        for model in FINITE:
            tried = []
            for rate in self._rates(setting, seed, model):
                tried.append(self._finite(task, setting, seed, model, rate))
                done += 1
                advance(100 * done // steps, 100)
            best = max(tried, key=lambda row: -math.inf if row["valid"] is None else row["valid"])
            rows.append({"kind": "score", **common, "model": model, **best})
        return rows

    def _task(self, setting: Setting, purpose: str, seed: int) -> Task:
        sizes, draws = self.plan.sizes_of(setting), generator_of(purpose, setting.task, seed)
        return TASKS[setting.task](sizes, self.plan.data, draws)

    def _limits(self, task: Task, setting: Setting, seed: int) -> dict[str, Tensor]:
        exact, count = task.x.double(), task.sizes.train
        sampled = AdamLike(
            task.x,
            count,
            setting.depth,
            task.y.shape[1],
            units=self.plan.units,
            generator=generator_of("kernel", setting.name, seed),
        )
        return {
            "ntk": torch.stack(tangent_kernels(exact, exact[:count], setting.depth)).sum(0),
            "adam-like": torch.stack(sampled.kernels()).sum(0),
        }

    def _rates(self, setting: Setting, seed: int, model: str) -> Sequence[float]:
        """All of them for the first seed, what it chose for the others."""
        if seed == 0:
            return self.plan.rates[model.split("-")[0]]
        first = Job(f"{setting.task}.depth{setting.depth}.seed0", setting, 0, setting.depth)
        return [line["choice"] for line in read_lines(self._file(first)) if line.get("model") == model]

    def _finite(self, task: Task, setting: Setting, seed: int, model: str, rate: float) -> dict[str, Any]:
        """Scores at the step that is best on the inputs set aside for choosing, and how far the features moved."""
        draws = generator_of("network", setting.name, seed)
        weights = initial(task.x.shape[1], self.plan.width, setting.depth, task.y.shape[1], draws)
        x, y = task.x[task.train], task.y[task.train]
        found: dict[str, Any] = {"score": None, "valid": None, "choice": rate}
        every = math.ceil(self.plan.steps / LOOKS)
        looks = train(weights, x, y, self.plan.recipe(model, rate), draws, every)
        for look, network in enumerate(looks, start=1):
            with torch.no_grad():
                valid, test = (task.score(network(task.x[rows]), rows) for rows in (task.valid, task.test))
            if not math.isfinite(valid):
                break
            if found["valid"] is None or valid > found["valid"]:
                found |= {
                    "score": test,
                    "valid": valid,
                    "step": min(look * every, self.plan.steps),
                    "movement": network.movement(task.x[task.test]),
                }
        return found
