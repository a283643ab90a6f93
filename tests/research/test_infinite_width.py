"""The limits are what wide networks become; the experiment resumes, and its verdicts and pages follow from records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from darkformer import InputError, RunFolderError
from darkformer.cli import app
from darkformer.reporting import Silent
from darkformer.research.infinite_width.convergence import distances
from darkformer.research.infinite_width.experiment import Experiment
from darkformer.research.infinite_width.kernels import AdamLike, symmetric_adam_like, tangent_kernels
from darkformer.research.infinite_width.networks import (
    Recipe,
    forward,
    gradient_squares,
    initial,
    parameter_roots,
    tangent,
    train,
)
from darkformer.research.infinite_width.plan import MODELS, Plan, Setting
from darkformer.research.infinite_width.report import draw, record_file
from darkformer.research.infinite_width.tasks import TASKS, Sizes
from darkformer.research.infinite_width.verdicts import CLAIMS, claim_table, slopes

#: Networks whose kernels are averaged: single ones vary.
NETWORKS = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(count: int = 8, dim: int = 5) -> Tensor:
    return torch.randn(count, dim, generator=generator(), dtype=torch.float64) / dim**0.5


def gradients(weights: tuple[Tensor, ...], x: Tensor) -> list[Tensor]:
    """By layer (N, C, parameters), from autograd."""
    rows = []
    for point in x:
        leaves = tuple(weight.clone().requires_grad_() for weight in weights)
        outputs = forward(leaves, point[None])[0][0]
        rows.append([torch.autograd.grad(output, leaves, retain_graph=True) for output in outputs])
    return [torch.stack([torch.stack([o[i].flatten() for o in row]) for row in rows]) for i in range(len(weights))]


def wide(depth: int, outputs: int, width: int, x: Tensor, power: float) -> list[Tensor]:
    """Each layer's preconditioned kernel, for the first output: autograd's gradients, a mean over `NETWORKS`."""
    total = [x.new_zeros(len(x), len(x)) for _ in range(depth + 1)]
    for seed in range(NETWORKS):
        weights = tuple(w.double() for w in initial(x.shape[1], width, depth, outputs, generator(seed)))
        for part, g, root in zip(total, gradients(weights, x), parameter_roots(weights), strict=True):
            squares = g.square().sum(1).mean(0)
            scale = torch.where(squares > 0, squares, torch.inf).pow(-0.5 * power)
            part += (g[:, 0] * scale) @ g[:, 0].T / root**power / NETWORKS
    return total


@pytest.mark.parametrize(("depth", "width"), [(1, 1000), (2, 250)])
def test_the_tangent_kernel_is_a_wide_networks(depth: int, width: int) -> None:
    x = inputs()
    for exact, found in zip(tangent_kernels(x, x, depth), wide(depth, 1, width, x, 0.0), strict=True):
        assert float((found - exact).norm() / exact.norm()) < 0.12


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(("depth", "width"), [(1, 1000), (2, 250)])
def test_the_adam_like_kernel_is_a_wide_networks(depth: int, width: int, outputs: int) -> None:
    """Layer by layer, so that no layer can hide another's factor."""
    x = inputs()
    limit = AdamLike(x, len(x), depth, outputs, units=4096, generator=generator(1)).kernels()
    for sampled, found in zip(limit, wide(depth, outputs, width, x, 1.0), strict=True):
        assert float((found - sampled).norm() / sampled.norm()) < 0.12


@pytest.mark.parametrize("depth", [1, 2])
def test_without_preconditioning_the_draws_give_the_tangent_kernel(depth: int) -> None:
    x = inputs()
    limit = AdamLike(x, 5, depth, 2, units=8192, generator=generator(1), power=0.0).kernels()
    for sampled, exact in zip(limit, tangent_kernels(x, x[:5], depth), strict=True):
        assert float((sampled - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("outputs", [1, 4])
def test_the_closed_form_for_symmetric_data(outputs: int) -> None:
    half = inputs(6, 4) * torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)  # the last weight is never moved
    x = torch.cat([half, -half])
    exact = symmetric_adam_like(x, x, x.T @ x / len(x), outputs)
    sampled = AdamLike(x, len(x), 1, outputs, units=20_000, generator=generator(2)).kernels()
    for form, draws in zip(exact, sampled, strict=True):
        assert float((draws - form).norm() / form.norm()) < 0.02


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_of_finite_networks(depth: int) -> None:
    x = inputs(4)
    weights = tuple(w.double() for w in initial(5, 7, depth, 3, generator()))
    for own, g in zip(gradient_squares(weights, x), gradients(weights, x), strict=True):
        assert torch.allclose(own.flatten(), g.square().sum(1).mean(0))
    moved = tuple(torch.randn(w.shape, generator=generator(1), dtype=w.dtype) for w in weights)
    expected = sum(torch.einsum("ncp,p->nc", g, m.flatten()) for g, m in zip(gradients(weights, x), moved, strict=True))
    assert torch.allclose(tangent(weights, moved, x), expected)


@pytest.mark.parametrize("depth", [0, 3])
def test_depths_that_are_not_derived(depth: int) -> None:
    with pytest.raises(InputError, match="1 or 2 hidden layers"):
        AdamLike(inputs(), 8, depth, 1, units=8, generator=generator())


@pytest.mark.parametrize("depth", [1, 2])
def test_wide_networks_approach_their_limit(depth: int) -> None:
    """Trained, not only at their start: a network 16 times as wide is at most half as far from its own limit."""
    plan = Plan(
        widths=(32, 512), widths_of_two=(32, 512), width_seeds=2, width_sizes=(16, 32), width_units=8192, most_adam=0
    )
    found = slopes(distances(plan, depth, lambda done, total, loss=None: None))
    assert {name for _, name in found} == {"sgd", "preconditioned"}
    for by, _ in found.values():
        assert by[512] < 0.5 * by[32]


def test_the_two_limits_are_not_one() -> None:
    """A negative control: networks under one optimizer do not approach the other's limit."""
    task = TASKS["digits"](Sizes(48, 0, 64), (), generator())
    tangents = sum(tangent_kernels(task.x, task.x, 1))
    adam = sum(AdamLike(task.x, 112, 1, 1, units=2048, generator=generator()).kernels())
    scale = float((tangents * adam).sum() / tangents.square().sum())
    assert float((adam - scale * tangents).norm() / adam.norm()) > 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("frozen", [True, False])
def test_training_learns(optimizer: str, frozen: bool) -> None:
    x, y = inputs(32).float(), inputs(32)[:, :1].float().abs()
    recipe = Recipe(optimizer, frozen, {"sgd": 0.3, "adam": 0.03}[optimizer], steps=120, batch=8)
    weights = initial(5, 64, 1, 1, generator())
    *_, last = train(weights, x, y, recipe, generator(), every=50)
    assert float((last(x).detach() - y).square().mean()) < 0.5 * float(y.square().mean())
    assert (last.movement(x) > 0) is not frozen


def test_the_tasks() -> None:
    sizes = Sizes(60, 20, 40)
    for name, task_of in TASKS.items():
        task, again = (task_of(sizes, ("pydoc",), generator()) for _ in range(2))
        assert torch.equal(task.x, again.x) and torch.equal(task.y, again.y)
        assert len(task.x[task.test]) == 40 and float(task.x.square().sum(-1).mean()) == pytest.approx(1, rel=0.1)
        assert task.score(task.y[task.test], task.test) == 1
        assert task.score(torch.full_like(task.y[task.test], torch.nan), task.test) == -math.inf
        if name != "text":
            assert task.x.shape[1] == 64
    with pytest.raises(InputError, match="the data set has 1797"):
        TASKS["digits"](Sizes(2000, 0, 1), (), generator())


TINY = Plan(
    settings=(Setting("digits", 1), Setting("sparse", 1)),
    seeds=2,
    sizes={"digits": (60, 20, 40), "sparse": (60, 20, 40)},
    width=16,
    steps=6,
    rates={"sgd": (0.3,), "adam": (0.03, 0.1)},
    units=64,
    widths=(16, 64),
    widths_of_two=(16, 64),
    width_seeds=1,
    width_sizes=(8, 8),
    width_units=256,
    most_adam=16,
)


class Stopped(Exception):
    pass


class StopsAt(Silent):
    """Fails when the stage of that name begins."""

    def __init__(self, name: str) -> None:
        self.name = name

    def stage(self, title: str, total: int) -> Any:
        if title.endswith(self.name):
            raise Stopped
        return super().stage(title, total)


def scores(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in record_file(out).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] != "run"]


def test_a_run_that_was_stopped_continues_to_the_same_numbers(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tables = Experiment(TINY, whole, Silent()).run()
    with pytest.raises(Stopped):
        Experiment(TINY, parts, StopsAt("digits.depth1.seed1")).run()
    assert not record_file(parts).exists()
    assert Experiment(TINY, parts, Silent()).table()[1:3] == [["digits", "1", "2", "1"], ["sparse", "1", "2", "1"]]
    with pytest.raises(RunFolderError, match="--resume continues it"):
        Experiment(TINY, parts, Silent()).run()
    with pytest.raises(RunFolderError, match="steps: 6 there, 7 now"):
        Experiment(replace(TINY, steps=7), parts, Silent()).run(resume=True)
    assert Experiment(TINY, parts, Silent()).run(resume=True) == tables
    assert scores(parts) == scores(whole)
    found = scores(whole)
    assert {row["model"] for row in found if row["kind"] == "score"} == set(MODELS)
    assert (whole / "plots" / "width.png").is_file()
    assert draw(whole) == tables


def test_the_command(tmp_path: Path) -> None:
    run: Callable[..., Any] = CliRunner().invoke
    plan = run(app, ["reproduce", "width", "--dry-run", "--out", str(tmp_path)])
    assert plan.exit_code == 0 and "digits" in plan.stdout
    for options, message in ((["--dtype", "bfloat16"], "one precision"), (["--plot-only"], "no record to draw from")):
        result = run(app, ["reproduce", "width", "--out", str(tmp_path), *options])
        assert result.exit_code == 1 and message in str(result.exception)


def record(**means: float) -> list[dict[str, Any]]:
    """Scores of five seeds around a mean for each model, in one setting."""
    return [
        {"kind": "score", "task": "sparse", "depth": 1, "seed": seed, "model": name.replace("_", "-"),
         "score": mean + 0.001 * seed * (-1) ** seed}
        for name, mean in means.items() for seed in range(5)
    ]  # fmt: skip


def verdict(letter: str, lines: list[dict[str, Any]]) -> str:
    return next(judge(lines)[0] for name, _, judge in CLAIMS if name == letter)


def test_verdicts_follow_from_records() -> None:
    as_claimed = record(ntk=0.7, adam_like=0.8, sgd_frozen=0.7, adam_frozen=0.8, sgd_learned=0.75, adam_learned=0.8)
    assert [verdict(letter, as_claimed) for letter in "abc"] == ["reproduced"] * 3
    opposite = record(ntk=0.8, adam_like=0.8, sgd_frozen=0.9, adam_frozen=0.8, sgd_learned=0.8, adam_learned=0.9)
    assert [verdict(letter, opposite) for letter in "abc"] == ["not reproduced"] * 3
    # An equally good limit that does not beat the NTK: one of two conditions.
    assert verdict("c", record(ntk=0.8, adam_like=0.8, adam_learned=0.8)) == "partly"
    within_noise = record(ntk=0.8, adam_like=0.796, adam_learned=0.8)
    assert "-0.4" in claim_table(within_noise)[3][3] and verdict("c", within_noise) == "partly"
    assert [verdict(letter, []) for letter in "abcde"] == ["not finished"] * 5


def test_verdicts_on_selection_and_limits() -> None:
    lines = record(adam_like=0.8, adam_learned=0.8)
    chosen = [{"kind": "selection", "model": m, "nearest": 3.0, "control": 1.0} for m in ("ntk", "adam-like")]
    assert verdict("d", lines + chosen) == "reproduced"
    assert verdict("d", record(adam_like=0.7, adam_learned=0.8) + chosen) == "partly"
    for power, expected in ((-0.5, "reproduced"), (-0.1, "not reproduced")):
        rows = [
            {"kind": "distance", "depth": 1, "optimizer": "sgd", "width": w, "seed": 0, "distance": w**power}
            for w in (64, 256, 1024)
        ]
        assert verdict("e", rows) == expected
