"""The experiment, unit by unit: a record file each, so that a killed run continues behind the last one."""

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
from .plan import FINITE, RIDGES, Plan, Setting, Unit
from .tasks import TASKS, Task

#: Epochs between two looks at the inputs that choose when to stop.
LOOK_EVERY = 5
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


def selection(task: Task, dual: Tensor, adam_like: bool, generator: torch.Generator) -> dict[str, float]:
    """How much more a kernel's solution moves the hidden units that resemble the target's than the others.

    The output weight of unit w moves by Σ_x c_x φ(w·x) D(w); times the root mean square of φ(w·x) it is the part of
    the function that the unit carries. `nearest` is the mean part of the `NEAREST` units, by correlation over the
    inputs with any of the target's units, over the mean of all; `control` the same for as many units of other targets.
    """
    assert task.teachers is not None
    x = task.x[task.train]
    activation = _relu(x @ torch.randn(x.shape[1], SELECTION_UNITS, generator=generator))
    size = activation.square().mean(0).sqrt()
    part = (dual.mT @ activation).norm(dim=0) * (size.sqrt() if adam_like else size)

    def ratio(teachers: Tensor) -> float:
        both = torch.corrcoef(torch.cat([_relu(teachers @ x.mT), activation.mT]))[: len(teachers), len(teachers) :]
        nearest = both.nan_to_num(-1).amax(0).topk(int(NEAREST * SELECTION_UNITS)).indices
        return float(part[nearest].mean() / part.mean())

    others = task.teachers[:, torch.randperm(x.shape[1], generator=generator)]
    return {"nearest": ratio(task.teachers), "control": ratio(others)}


class Experiment:
    """Runs a plan in one folder."""

    def __init__(self, plan: Plan, out: Path, reporter: Reporter) -> None:
        self.plan, self.out, self.reporter = plan, out, reporter

    def _file(self, unit: Unit) -> Path:
        return self.out / "stages" / f"{unit.name}.jsonl"

    def table(self) -> list[list[str]]:
        """The plan: header, then a row a setting with its seeds and those of them that are left."""
        rows = [["task", "hidden layers", "seeds", "left"]]
        units = self.plan.units_of_work()
        for kind in dict.fromkeys((unit.setting, unit.depth) for unit in units):
            own = [unit for unit in units if (unit.setting, unit.depth) == kind]
            left = sum(not read_lines(self._file(unit)) for unit in own)
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
        units = self.plan.units_of_work()
        for i, unit in enumerate(units):
            if read_lines(self._file(unit)):
                continue
            started = time.perf_counter()
            with self.reporter.stage(f"[{i + 1}/{len(units)}] {unit.name}", 100) as advance:
                rows = self._done(unit, advance)
            seconds = round(time.perf_counter() - started, 1)
            write_lines(self._file(unit), [{"unit": unit.name, "seconds": seconds, **row} for row in rows])
        lines = [line for unit in units for line in read_lines(self._file(unit))]
        write_lines(report.record_file(self.out), [*lines, {"kind": "run", "environment": environment()}])
        return report.draw(self.out)

    def _done(self, unit: Unit, advance: Advance) -> list[dict[str, Any]]:
        if unit.setting is None:
            plan = self.plan
            count, test = plan.width_sizes
            return distances(
                unit.depth,
                plan.widths if unit.depth == 1 else plan.widths_of_two,
                plan.width_seeds,
                train=count,
                test=test,
                units=plan.width_units,
                most_adam=plan.most_adam,
                advance=advance,
            )
        return self._scores(unit.setting, unit.seed, advance)

    def _scores(self, setting: Setting, seed: int, advance: Advance) -> list[dict[str, Any]]:
        task = TASKS[setting.task](
            self.plan.sizes_of(setting), self.plan.data, generator_of("split", setting.task, seed)
        )
        common = {"task": setting.task, "depth": setting.depth, "seed": seed}
        rows, steps = [], 1 + sum(len(self._rates(setting, seed, model)) for model in FINITE)
        for model, kernel in self._limits(task, setting, seed).items():
            scores, dual = ridge_regression(kernel, task)
            rows.append({"kind": "score", **common, "model": model, **scores})
            if task.teachers is not None:
                found = selection(task, dual, model == "adam-like", generator_of("selection", seed))
                rows.append({"kind": "selection", **common, "model": model, **found})
        done = 1
        advance(100 * done // steps, 100)
        for model in FINITE:
            tried = []
            for rate in self._rates(setting, seed, model):
                tried.append(self._finite(task, setting, seed, model, rate))
                done += 1
                advance(100 * done // steps, 100)
            best = max(tried, key=lambda row: row["valid"])
            rows.append({"kind": "score", **common, "model": model, **best})
        return rows

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
            "ntk": sum(tangent_kernels(exact, exact[:count], setting.depth), torch.tensor(0.0)),
            "adam-like": sum(sampled.kernels(), torch.tensor(0.0)),
        }

    def _rates(self, setting: Setting, seed: int, model: str) -> Sequence[float]:
        """All of them for the first seed, what it chose for the others."""
        if seed == 0:
            return self.plan.rates[model.split("-")[0]]
        first = Unit(f"{setting.task}.depth{setting.depth}.seed0", setting, 0, setting.depth)
        return [line["choice"] for line in read_lines(self._file(first)) if line.get("model") == model]

    def _finite(self, task: Task, setting: Setting, seed: int, model: str, rate: float) -> dict[str, Any]:
        """Scores at the epoch that is best on the inputs set aside for choosing, and how far the features moved."""
        draws = generator_of("network", setting.name, seed)
        weights = initial(task.x.shape[1], self.plan.width, setting.depth, task.y.shape[1], draws)
        x, y = task.x[task.train], task.y[task.train]
        found: dict[str, Any] = {"score": None, "valid": -math.inf, "choice": rate}
        for epoch, network in enumerate(train(weights, x, y, self.plan.recipe(model, rate), draws), start=1):
            if epoch % LOOK_EVERY and epoch < self.plan.epochs:
                continue
            with torch.no_grad():
                valid, test = (task.score(network(task.x[rows]), rows) for rows in (task.valid, task.test))
            if not math.isfinite(valid):
                break
            if valid > found["valid"]:
                found |= {
                    "score": test,
                    "valid": valid,
                    "epoch": epoch,
                    "movement": network.movement(task.x[task.test]),
                }
        return found
