"""Kernels of infinitely wide ReLU networks that are trained lazily: by gradient descent, and by an Adam-like optimizer.

The network, in the parametrisation in which its tangent kernel converges (Jacot et al. 2018), has one or two hidden
layers h_l = φ(W_l h_{l-1} / √width_{l-1}), h_0 = x (not divided), φ(z) = √2·max(z, 0), and outputs a·h / √width; every
weight starts from N(0, 1). While training is lazy, f is linear in the parameters, with the gradients g_i(x) = ∂f/∂θ_i
at the start. A step of size η·D_i against the gradient of ½E_x r(x)², r = f - y, moves f(x) by -η·E_x'[K(x, x')·r(x')],

    K(x, x') = Σ_i D_i g_i(x) g_i(x').

Gradient descent has D_i = 1: K is the neural tangent kernel, in closed form. Adam divides by the root of a running mean
of squared gradients. In batches of one that mean is E_x[r(x)² g_i(x)²]; with residuals whose size does not depend on
g_i, it is E[r²]·E_x[g_i(x)²], and E[r²] only changes the speed. So

    D_i = E_x[g_i(x)²]^{-½},

fixed by the data's inputs and the start. As the width grows the sum over a layer's parameters becomes an expectation
over independent weights and Gaussian fields; docs/infinite-width.md has the derivation with all its assumptions. This
Adam-like limit is ours: of the paper ("Infinite Width Models That Work", arXiv 2406.18800) only the abstract was read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError

#: Units of an input layer whose gradients are held at once: each has as many parameters as the input has coordinates.
UNITS_AT_ONCE = 64
#: Draws of the other layers for each unit of the input layer: their draws have one parameter each, and cost little.
DRAWS_A_UNIT = 16
#: Added to the variances of Gaussian fields, relative to their mean: repeated inputs make covariances singular.
JITTER = 1e-6


def arc_cosine(covariance: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """E[φ(u)φ(v)] and E[φ'(u)φ'(v)] for Gaussian u, v of mean 0 and φ(z) = √2·max(z, 0) (Cho & Saul 2009).

    Args:
        covariance: E[uv] (N, M). left: E[u²] (N,). right: E[v²] (M,). With this φ they are E[φ(u)²] and E[φ(v)²] too.
    """
    norm = (left[:, None] * right).sqrt()
    angle = (covariance / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(-1, 1).acos()
    slope = 1 - angle / math.pi
    return norm * (angle.sin() / math.pi + slope * angle.cos()), slope


class Fields(NamedTuple):
    """Covariances of an infinitely wide network at pairs of inputs, one matrix a layer."""

    values: list[Tensor]  # of what enters each layer's weights: inputs, then activations
    slopes: list[Tensor]  # E[φ'φ'] of each hidden layer


def fields(x: Tensor, y: Tensor, depth: int) -> Fields:
    """Covariances between inputs x (N, d) and y (M, d) through `depth` hidden layers."""
    left, right = x.square().sum(-1), y.square().sum(-1)
    values, slopes = [x @ y.mT], []
    for _ in range(depth):
        value, slope = arc_cosine(values[-1], left, right)
        values.append(value)
        slopes.append(slope)
    return Fields(values, slopes)


def tangent_kernels(x: Tensor, y: Tensor, depth: int) -> list[Tensor]:
    """The neural tangent kernel, each layer's part by itself, the input layer first: depth + 1 matrices (N, M).

    Args:
        x: inputs (N, d). y: inputs (M, d). depth: hidden layers.
    """
    found = fields(x, y, depth)
    parts = []
    for layer, value in enumerate(found.values):
        for slope in found.slopes[layer:]:
            value = value * slope
        parts.append(value)
    return parts


class _Draws(NamedTuple):
    """Gradients of a few parameters, times the root of their layer's number; of one output, and squares over all."""

    gradient: Tensor  # (N, P)
    square: Tensor  # (P,) E_x Σ_c g_c(x)² over the inputs that were trained on


def _normals(shape: tuple[int, ...], x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=x.dtype)


def _root(covariance: Tensor) -> Tensor:
    """A square root (N, N) of a covariance that may be singular."""
    jitter = JITTER * covariance.diagonal().mean()
    return torch.linalg.cholesky(covariance + jitter * torch.eye(len(covariance), dtype=covariance.dtype))


def _relu(z: Tensor) -> Tensor:
    return math.sqrt(2) * z.clamp_min(0)


def _slope(z: Tensor) -> Tensor:
    return math.sqrt(2) * (z > 0).to(z.dtype)


class AdamLike:
    """The Adam-like limit, layer by layer, by Monte-Carlo over parameters: unbiased, with an error of 1/√units.

    Args:
        x: inputs (N, d); the first `trained` of them are the ones the optimizer sees.
        depth: hidden layers, 1 or 2. outputs: C; the kernel is that of each of them, different ones do not interact.
        units: drawn units of the input layer.
        power: D_i = E[g_i²]^{-power/2}: 1 is the Adam-like limit, 0 the neural tangent kernel.

    Raises:
        InputError: another depth, or fewer inputs than `trained`.
    """

    def __init__(
        self,
        x: Tensor,
        trained: int,
        depth: int,
        outputs: int,
        *,
        units: int,
        generator: torch.Generator,
        power: float = 1.0,
    ) -> None:
        if depth not in (1, 2) or not 0 < trained <= len(x):
            raise InputError(
                f"depth {depth}, {trained} of {len(x)} inputs trained on: the limit is derived for 1 or 2 hidden "
                "layers and at least one input."
            )
        self.x, self.trained, self.depth, self.outputs = x, trained, depth, outputs
        self.units, self.generator, self.power = units, generator, power

    def kernels(self) -> list[Tensor]:
        """Each layer's part, the input layer first: depth + 1 matrices (N, trained)."""
        draws = self.units * DRAWS_A_UNIT
        if self.depth == 1:
            layers = [self._input_layer(self._flat_field()), self._output_layer(self.x, draws)]
        else:
            found = fields(self.x.double(), self.x.double(), 2)  # single precision is not enough for their roots
            preactivation = _root(found.values[1]).to(self.x)  # of the second hidden layer
            layers = [
                self._input_layer(self._smooth_field(_root(found.slopes[1]).to(self.x))),
                self._inner_layer(preactivation, draws),
                self._output_layer(preactivation, draws),
            ]
        return [self._mean(layer) for layer in layers]

    def _mean(self, layer: Iterator[tuple[int, _Draws]]) -> Tensor:
        total, count = self.x.new_zeros(len(self.x), self.trained), 0
        for drawn, (gradient, square) in layer:
            # A parameter whose gradient is zero on everything trained on is never moved.
            scale = torch.where(square > 0, square, torch.inf).pow(-0.5 * self.power) if self.power else 1.0
            total.addmm_(gradient * scale, gradient[: self.trained].mT)
            count += drawn
        return total / count

    def _chunks(self, draws: int, size: int) -> Iterator[int]:
        yield from (min(size, draws - start) for start in range(0, draws, size))

    def _output_sizes(self, count: int) -> Tensor:
        """‖a‖ of the weights from a unit to all outputs, (count,)."""
        return _normals((self.outputs, count), self.x, self.generator).norm(dim=0)

    def _flat_field(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What comes back to single units of the only hidden layer: the same for every input."""
        for count in self._chunks(self.units, UNITS_AT_ONCE):
            size = self._output_sizes(count).expand(len(self.x), -1)
            yield size / math.sqrt(self.outputs), size[: self.trained].square()

    def _smooth_field(self, root: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What comes back to single units of the first of two hidden layers: a Gaussian field for each output."""
        for count in self._chunks(self.units, UNITS_AT_ONCE):
            field = root @ _normals((len(root), self.outputs * count), self.x, self.generator)
            field = field.unflatten(1, (self.outputs, count))
            yield field[:, 0], field[: self.trained].square().sum(1)

    def _input_layer(self, back: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[int, _Draws]]:
        seen = self.x[: self.trained].square()
        for field, squares in back:
            count = field.shape[1]
            slope = _slope(self.x @ _normals((self.x.shape[1], count), self.x, self.generator))
            gradient = (field * slope)[:, :, None] * self.x[:, None, :]  # (N, units, d)
            square = (squares * slope[: self.trained].square()).mT @ seen / self.trained
            yield count, _Draws(gradient.flatten(1), square.flatten())

    def _inner_layer(self, root: Tensor, draws: int) -> Iterator[tuple[int, _Draws]]:
        for count in self._chunks(draws, 4096):
            slope = _slope(root @ _normals((len(root), count), self.x, self.generator))
            activation = _relu(self.x @ _normals((self.x.shape[1], count), self.x, self.generator))
            size = self._output_sizes(count) / math.sqrt(self.outputs)
            yield count, self._draws(slope * activation * size, self.outputs)

    def _output_layer(self, root: Tensor, draws: int) -> Iterator[tuple[int, _Draws]]:
        for count in self._chunks(draws, 4096):
            yield count, self._draws(_relu(root @ _normals((root.shape[1], count), self.x, self.generator)), 1)

    def _draws(self, gradient: Tensor, outputs: int) -> _Draws:
        return _Draws(gradient, outputs * gradient[: self.trained].square().mean(0))


def symmetric_adam_like(x: Tensor, y: Tensor, moment: Tensor, outputs: int = 1) -> list[Tensor]:
    """The Adam-like limit of one hidden layer in closed form, for data that contain -x as often as x.

    Half of such data switches a unit on, so E[φ(w·x)²] = wᵀSw and E[φ'(w·x)² x_j²] = S_jj with S = E[xxᵀ]. The input
    layer is then an arc-cosine kernel; 1/√(wᵀSw) = ∫ (πs)^-½ exp(-s·wᵀSw) ds makes the output layer an integral of
    arc-cosine kernels with covariance (I + 2sS)⁻¹, taken over log s by the trapezoidal rule (error below 1e-6).

    Args:
        x: inputs (N, d). y: inputs (M, d). moment: S (d, d), of the inputs trained on.

    Returns:
        Input layer and output layer, (N, M) each.
    """
    diagonal = moment.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    # E‖a‖ of C weights, over C.
    size = math.sqrt(2) * math.exp(math.lgamma((outputs + 1) / 2) - math.lgamma(outputs / 2)) / outputs
    slope = fields(x, y, 1).slopes[0]
    values, vectors = torch.linalg.eigh(moment)
    values, left, right = values.clamp_min(0), x @ vectors, y @ vectors
    total, step = x.new_zeros(len(x), len(y)), 0.25
    for log_s in torch.arange(-32, 32, step, dtype=x.dtype):
        shrink = 1 / (1 + 2 * log_s.exp() * values)
        a, b = left * shrink.sqrt(), right * shrink.sqrt()
        weight = step * (0.5 * log_s + 0.5 * shrink.log().sum()).exp() / math.sqrt(math.pi)
        total += weight * arc_cosine(a @ b.mT, a.square().sum(-1), b.square().sum(-1))[0]
    return [size * slope * ((x * scale) @ y.mT), total]
