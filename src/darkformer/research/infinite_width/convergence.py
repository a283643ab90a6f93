"""How far finite networks are from the limit of their optimizer, as the width grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...reporting import Advance
from .kernels import AdamLike, tangent_kernels
from .networks import Weights, forward, gradient_squares, initial, parameter_roots
from .plan import Plan
from .tasks import Sizes, digits

#: Optimizer → what it is.
OPTIMIZERS = {
    "sgd": "gradient descent",
    "preconditioned": "descent divided by E[g²]^½",
    "adam": "Adam, batches of 1",
}
#: Steps of the first two, at the greatest rate that every mode of the limit follows without overshooting.
STEPS = 40
#: Passes over the inputs by Adam.
PASSES = 60


class Limit:
    """A limit's kernel on a few inputs, and the function it predicts.

    Args:
        kernel: (N, n), the first n inputs are trained on. y: (n, 1).
    """

    def __init__(self, kernel: Tensor, y: Tensor) -> None:
        count = len(y)
        self.across = kernel.double() / count
        self.values, self.vectors = torch.linalg.eigh(0.5 * (self.across[:count] + self.across[:count].mT))
        self.target = self.vectors.mT @ y.double()

    @property
    def rate(self) -> float:
        """The rate at which the fastest mode is learned in one step."""
        return float(1 / self.values[-1])

    def after(self, left: Tensor) -> Tensor:
        """Outputs (N, 1) where share `left` (n,) of each mode's residual remains."""
        return self.across @ (self.vectors @ ((1 - left)[:, None] / self.values[:, None] * self.target))

    def steps(self, count: int) -> Tensor:
        """After steps of gradient descent on all inputs, at `rate`."""
        return self.after((1 - self.rate * self.values).pow(count))

    def time(self, elapsed: float) -> Tensor:
        """After a continuous time."""
        return self.after((-elapsed * self.values).exp())


def _descended(weights: Weights, x: Tensor, y: Tensor, limit: Limit, preconditioned: bool) -> Tensor:
    """Outputs at all of x after `STEPS` of gradient descent on its first len(y)."""
    start, seen = forward(weights, x)[0], x[: len(y)]
    scales: Sequence[Tensor | float] = [1.0] * len(weights)
    if preconditioned:
        scales = [
            torch.where(square > 0, square, torch.inf).rsqrt() / root
            for square, root in zip(gradient_squares(weights, seen), parameter_roots(weights), strict=True)
        ]
    weights = tuple(weight.clone().requires_grad_() for weight in weights)
    for _ in range(STEPS):
        loss = 0.5 * (forward(weights, seen)[0] - start[: len(y)] - y).square().mean()
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient, scale in zip(weights, gradients, scales, strict=True):
                weight -= limit.rate * scale * gradient
    return (forward(weights, x)[0] - start).detach()


def _adam(weights: Weights, x: Tensor, y: Tensor, limit: Limit, generator: torch.Generator) -> tuple[Tensor, float]:
    """Outputs at all of x after Adam in batches of 1, and the limit's time that this is.

    The limit's speed is one over the root of the running mean of squared residuals, which Adam's own means contain.
    """
    start = forward(weights, x)[0]
    weights = tuple(weight.clone().requires_grad_() for weight in weights)
    steps = PASSES * len(y)
    rate = STEPS * limit.rate / steps
    groups = [
        {"params": [weight], "lr": rate / root} for weight, root in zip(weights, parameter_roots(weights), strict=True)
    ]
    optimizer = torch.optim.Adam(groups, eps=1e-12)
    decay = optimizer.defaults["betas"][1]
    mean, elapsed = 0.0, 0.0
    order = torch.cat([torch.randperm(len(y), generator=generator) for _ in range(PASSES)])
    for step, row in enumerate(order):
        optimizer.zero_grad()
        residual = forward(weights, x[row : row + 1])[0] - start[row] - y[row]
        (0.5 * residual.square().sum()).backward()
        optimizer.step()
        mean = decay * mean + (1 - decay) * float(residual.detach().square())
        elapsed += rate / math.sqrt(mean / (1 - decay ** (step + 1)))
    return (forward(weights, x)[0] - start).detach(), elapsed


def distances(plan: Plan, depth: int, advance: Advance) -> list[dict[str, Any]]:
    """One record line for each optimizer, width and seed: how far the trained network is from the limit.

    The task is to tell even digits from odd ones, with one output of ±1. The distance is the root mean square
    difference on inputs not trained on, over the root mean square of the limit.
    """
    train, test = plan.width_sizes
    widths = plan.widths if depth == 1 else plan.widths_of_two
    generator = torch.Generator().manual_seed(depth)
    task = digits(Sizes(train, 0, test), (), generator)
    x, y = task.x, 1 - 2.0 * (task.y.argmax(-1, keepdim=True)[:train] % 2)
    exact = Limit(torch.stack(tangent_kernels(x.double(), x[:train].double(), depth)).sum(0), y)
    layers = AdamLike(x, train, depth, 1, units=plan.width_units, generator=generator).kernels()
    sampled = Limit(torch.stack(layers).sum(0), y)
    rows = []
    for width in widths:
        for seed in range(plan.width_seeds):
            draws = torch.Generator().manual_seed(1000 * depth + seed)
            weights = initial(x.shape[1], width, depth, 1, draws)
            found = {
                "sgd": (_descended(weights, x, y, exact, False), exact.steps(STEPS)),
                "preconditioned": (_descended(weights, x, y, sampled, True), sampled.steps(STEPS)),
            }
            if width <= plan.most_adam:
                outputs, elapsed = _adam(weights, x, y, sampled, draws)
                found["adam"] = outputs, sampled.time(elapsed)
            rows += [
                {
                    "kind": "distance",
                    "depth": depth,
                    "optimizer": name,
                    "width": width,
                    "seed": seed,
                    "distance": float((own - limit)[train:].norm() / limit[train:].norm()),
                }
                for name, (own, limit) in found.items()
            ]
            advance(100 * len({(row["width"], row["seed"]) for row in rows}) // (len(widths) * plan.width_seeds), 100)
    return rows
