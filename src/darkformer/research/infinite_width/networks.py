"""Finite ReLU networks in the same parametrisation, whole or linearised at their start, and how they are trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import _relu, _slope

#: Weights of every layer, (width, d) first and (C, width) last.
Weights = tuple[Tensor, ...]


def initial(dim: int, width: int, depth: int, outputs: int, generator: torch.Generator) -> Weights:
    """Weights from N(0, 1): `depth` hidden layers of one width."""
    sizes = [dim, *[width] * depth, outputs]
    return tuple(torch.randn(sizes[i + 1], sizes[i], generator=generator) for i in range(depth + 1))


def _divisor(layer: int, weight: Tensor) -> float:
    """Every layer but the first divides by the root of its inputs' number."""
    return math.sqrt(weight.shape[1]) if layer else 1.0


def forward(weights: Weights, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (N, C) and what enters every layer's weights.

    Args:
        x: inputs (N, d).
    """
    entering = [x]
    for layer, weight in enumerate(weights[:-1]):
        entering.append(_relu(entering[-1] @ weight.mT / _divisor(layer, weight)))
    return entering[-1] @ weights[-1].mT / _divisor(len(weights) - 1, weights[-1]), entering


def tangent(weights: Weights, moved: Weights, x: Tensor) -> Tensor:
    """Σ_i ∂f/∂θ_i(x)·moved_i at `weights`: what the linearised network's outputs (N, C) change by."""
    h, dh = x, torch.zeros_like(x)
    for layer, (weight, change) in enumerate(zip(weights, moved, strict=True)):
        divisor = _divisor(layer, weight)
        z, dh = h @ weight.mT / divisor, (h @ change.mT + dh @ weight.mT) / divisor
        if layer < len(weights) - 1:
            h, dh = _relu(z), _slope(z) * dh
    return dh


def gradient_squares(weights: Weights, x: Tensor) -> list[Tensor]:
    """Σ_c of the mean over inputs x (N, d) of (∂f_c/∂θ)², in the shape of the weights."""
    _, entering = forward(weights, x)
    squares = [torch.zeros_like(weight) for weight in weights]
    for output in range(len(weights[-1])):
        divisor = _divisor(len(weights) - 1, weights[-1])
        squares[-1][output] = entering[-1].square().mean(0) / divisor**2
        back = (weights[-1][output] / divisor).expand(len(x), -1)
        for layer in range(len(weights) - 2, -1, -1):
            divisor = _divisor(layer, weights[layer])
            back = back * math.sqrt(2) * (entering[layer + 1] > 0) / divisor
            squares[layer] += back.square().mT @ entering[layer].square() / len(x)
            back = back @ weights[layer]
    return squares


def parameter_roots(weights: Weights) -> list[float]:
    """By layer the root of the number of parameters its kernel averages over; Adam's rate is divided by it.

    Without that the middle one of two hidden layers, with width² parameters, would move f more than the others by
    √width: the limit would be its kernel alone. (Coordinates of the input are summed over, not averaged.)
    """
    counts = [weight.numel() for weight in weights]
    counts[0], counts[-1] = len(weights[0]), weights[-1].shape[1]
    return [math.sqrt(count) for count in counts]


@dataclass(frozen=True)
class Recipe:
    """One way to train."""

    optimizer: str  # "sgd", or "adam" with PyTorch's defaults
    frozen: bool  # whether the network is linearised at its start
    rate: float  # falls linearly to 0; "adam": each layer's is divided by `parameter_roots`
    steps: int
    batch: int


@dataclass(frozen=True)
class Network:
    """A network under training: f is 0 at its start, `weights`, and `moved` is what was learned since."""

    weights: Weights
    moved: Weights
    frozen: bool

    def _now(self) -> Weights:
        return tuple(weight + change for weight, change in zip(self.weights, self.moved, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (N, C) at x (N, d)."""
        if self.frozen:
            return tangent(self.weights, self.moved, x)
        return forward(self._now(), x)[0] - forward(self.weights, x)[0]

    @torch.no_grad()
    def movement(self, x: Tensor) -> float:
        """Relative change of the last hidden layer's activations at x; 0 where the features are frozen."""
        if self.frozen:
            return 0.0
        before, after = (forward(weights, x)[1][-1] for weights in (self.weights, self._now()))
        return float((after - before).norm() / before.norm())


def _optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(network.moved, lr=recipe.rate)
    groups = [
        {"params": [change], "lr": recipe.rate / root}
        for change, root in zip(network.moved, parameter_roots(network.weights), strict=True)
    ]
    return torch.optim.Adam(groups, eps=1e-12)  # the gradients of wide layers are small


def train(
    weights: Weights, x: Tensor, y: Tensor, recipe: Recipe, generator: torch.Generator, every: int
) -> Iterator[Network]:
    """Trains on ½‖f - y‖² and yields the network after every so many steps; the next ones alter it.

    Args:
        weights: the start; not altered. x: inputs (N, d). y: targets (N, C). generator: draws the batches.
    """
    moved = tuple(torch.zeros_like(weight, requires_grad=True) for weight in weights)
    network = Network(weights, moved, recipe.frozen)
    optimizer = _optimizer(network, recipe)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, recipe.steps)
    for step in range(1, recipe.steps + 1):
        rows = torch.randint(len(x), (recipe.batch,), generator=generator)
        optimizer.zero_grad()
        loss = 0.5 * (network(x[rows]) - y[rows]).square().sum(-1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == recipe.steps:
            yield network
