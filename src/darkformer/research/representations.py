"""Representations of exp(xᵀy) by random scalar features, each drawn from its own best distribution.

A representation is a density p and functions f_ω with E_p[f_ω(x) f_ω(y)] = K(x, y) = exp(xᵀy). For x and y of one
distribution the best policy is ψ* ∝ p·E_x[f_ω(x)²], and its error is ((E K(x, x))² - E K(x, y)²)/m for all of them
("All Random Features Representations are Equivalent", Sernau et al. 2024). Since E_p[f_ω(x)²] = K(x, x), ψ* is a
mixture: choose x with weight K(x, x), then ω from p·f_ω(x)²/K(x, x). That is how every representation is drawn here.

Which representations the paper compares is not known to us; these are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Features(NamedTuple):
    """Features of D draws at N points: sign·exp(log_size), (D, N)."""

    log_size: Tensor
    sign: Tensor


def _normals(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _angles(like: Tensor, generator: torch.Generator, optimal: bool) -> Tensor:
    """(D, 1) uniform angles, or of density ∝ cos²."""
    angle = 2 * math.pi * torch.rand(len(like), 1, generator=generator, dtype=like.dtype)
    if not optimal:
        return angle
    # F(t) = (t + ½ sin 2t)/2π is the distribution of that density; halving the interval inverts it.
    share, low, high = angle / (2 * math.pi), torch.zeros_like(angle), torch.full_like(angle, 2 * math.pi)
    for _ in range(50):
        middle = 0.5 * (low + high)
        below = (middle + 0.5 * (2 * middle).sin()) / (2 * math.pi) < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def positive(x: Tensor, chosen: Tensor, optimal: bool, generator: torch.Generator) -> Features:
    """exp(ωᵀx - ½‖x‖²), ω ~ N(0, I); best for a point x from N(2x, I).

    Args:
        x: points (N, d), float64. chosen: the point (D, d) that each draw is the best one for. optimal: draw so; else
            from p.
    """
    omega = _normals(chosen, generator) + (2 * chosen if optimal else 0)
    log_size = omega @ x.mT - 0.5 * x.square().sum(-1)
    return Features(log_size, torch.ones_like(log_size))


def trigonometric(x: Tensor, chosen: Tensor, optimal: bool, generator: torch.Generator) -> Features:
    """exp(½‖x‖²)·√2·cos(ωᵀx + b), b uniform; best for a point x with ωᵀx + b from a density ∝ cos²."""
    omega, phase = _normals(chosen, generator), _angles(chosen, generator, optimal)
    if optimal:
        phase = phase - (omega * chosen).sum(-1, keepdim=True)
    wave = math.sqrt(2) * (omega @ x.mT + phase).cos()
    return Features(0.5 * x.square().sum(-1) + wave.abs().clamp_min(1e-300).log(), wave.sign())


def mixed(x: Tensor, chosen: Tensor, optimal: bool, generator: torch.Generator) -> Features:
    """Positive or trigonometric, by a fair coin that belongs to the draw; best: the same coin, each drawn best."""
    coin = torch.rand(len(chosen), 1, generator=generator, dtype=x.dtype) < 0.5
    first, second = (form(x, chosen, optimal, generator) for form in (positive, trigonometric))
    return Features(*(torch.where(coin, a, b) for a, b in zip(first, second, strict=True)))


def hadamard(x: Tensor, chosen: Tensor, optimal: bool, generator: torch.Generator) -> Features:
    """A Hadamard product, exp(xᵀy) = exp(½xᵀy)·exp(½xᵀy): positive features of one factor times waves of the other."""
    half, point = x / math.sqrt(2), chosen / math.sqrt(2)
    first, second = (form(half, point, optimal, generator) for form in (positive, trigonometric))
    return Features(first.log_size + second.log_size, first.sign * second.sign)


REPRESENTATIONS: dict[str, Callable[[Tensor, Tensor, bool, torch.Generator], Features]] = {
    "positive": positive,
    "trigonometric": trigonometric,
    "mixed": mixed,
    "hadamard": hadamard,
}


class Measured(NamedTuple):
    """Expected squared error of one draw over the least there can be, and its standard error."""

    ratio: float
    standard_error: float


def error_over_bound(
    name: str, x: Tensor, *, optimal: bool, draws: int, generator: torch.Generator, at_once: int = 2000
) -> Measured:
    """Squared error of single draws of a representation, a mean over all pairs of points, over the lower bound.

    Args:
        x: points (N, d), for queries and keys alike. optimal: drawn from ψ* with weight p/ψ*; else from p.
    """
    x = x.double()
    growth = x.square().sum(-1)
    top = growth.amax()  # every kernel is taken relative to exp(top)
    kernel = (x @ x.mT - top).exp()
    diagonal, square = kernel.diagonal().mean(), kernel.square().mean()
    errors = []
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        chosen = x[torch.multinomial(growth.softmax(0), count, replacement=True, generator=generator)]
        found = REPRESENTATIONS[name](x, chosen, optimal, generator)
        features = found.sign * (found.log_size - 0.5 * top).exp()
        squares = features.square().mean(-1)
        weight = diagonal / squares if optimal else torch.ones_like(squares)
        cross = ((features @ kernel) * features).mean(-1) / len(x)
        errors.append((weight * squares).square() - 2 * weight * cross + square)
    every = torch.cat(errors) / (diagonal.square() - square)
    return Measured(float(every.mean()), float(every.std() / len(every) ** 0.5))
