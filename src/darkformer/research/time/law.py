"""A loss law in parameters and tokens, and the same law in parameters and seconds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ...errors import InputError

Array = np.ndarray[Any, np.dtype[np.float64]]
#: Starts of the fit: by how much log E lies below the least log loss, and both exponents. The best end is kept.
STARTS = tuple(itertools.product((0.05, 0.3, 1.0), (0.2, 0.4, 0.8)))
#: Share of the least loss that both reducible terms start with.
REDUCIBLE = 0.15
#: Residual of log loss from which on it counts linearly, so that one bad run does not bend the law.
HUBER = 1e-2
ITERATIONS = 500
#: Runs below which five coefficients say nothing.
FEWEST = 6


class Observation(NamedTuple):
    """A finished run: parameters, tokens trained on, loss in nats a token."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A·N^-α + B·D^-β (Hoffmann et al. 2022), N all parameters, D tokens of one pass over the text.

    Attributes:
        irreducible, parameter_scale, token_scale: E, A, B. alpha, beta: the exponents.
    """

    irreducible: float
    parameter_scale: float
    token_scale: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token after training on `tokens`."""
        return self.irreducible + self.parameter_scale * parameters**-self.alpha + self.token_scale * tokens**-self.beta

    def loss_in_time(self, parameters: float, seconds: float, tokens_per_second: float) -> float:
        """Nats a token after training for `seconds`: L(N, T) = E + A·N^-α + B·(r·T)^-β, r the shape's speed."""
        return self.loss(parameters, seconds * tokens_per_second)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _terms(x: Array, runs: Array) -> Array:
    """(3, runs): A·N^-α, B·D^-β and E at x = (log A, log B, log E, α, β), N and D in units of their geometric means."""
    return np.exp([x[0] - x[3] * runs[0], x[1] - x[4] * runs[1], np.full(runs.shape[1], x[2])])


def _cost(x: Array, runs: Array) -> float:
    """Huber's loss of the log losses' residuals."""
    size = np.abs(np.log(_terms(x, runs).sum(0)) - runs[2])
    return float(np.where(size <= HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER)).sum())


def _minimised(x: Array, runs: Array) -> Array:
    """Levenberg's method from a start, with Huber's weights."""
    damping, cost = 1e-2, _cost(x, runs)
    for _ in range(ITERATIONS):
        terms = _terms(x, runs)
        total = terms.sum(0)
        residual = np.log(total) - runs[2]
        weights = np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-300))
        slopes = np.array([*terms, -runs[0] * terms[0], -runs[1] * terms[1]]) / total
        normal = slopes * weights @ slopes.T
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-12), slopes * weights @ residual)
        with np.errstate(over="ignore"):
            trial = _cost(x - step, runs)
        if trial < cost:
            x, cost, damping = x - step, trial, damping / 3
        else:
            damping *= 4
            if damping > 1e12:
                break
    return x


def fit_law(runs: Sequence[Observation]) -> LossLaw:
    """Coefficients by Huber's loss on log losses from a grid of starts, as Hoffmann et al. fit theirs.

    Raises:
        InputError: too few runs, or all of one size or one length.
    """
    if len(runs) < FEWEST or len({x.parameters for x in runs}) < 2 or len({x.tokens for x in runs}) < 2:
        raise InputError(
            f"{len(runs)} runs for a law with five coefficients: give at least {FEWEST}, of two sizes and two lengths."
        )
    logs = np.log(np.array(runs, dtype=np.float64)).T
    centers = logs.mean(1)
    logs[:2] -= centers[:2, None]
    least = float(logs[2].min())
    part = least + math.log(REDUCIBLE)
    starts = [np.array([part, part, least - below, exponent, exponent]) for below, exponent in STARTS]
    ends = [_minimised(start, logs) for start in starts]
    log_a, log_b, log_e, alpha, beta = min(ends, key=lambda x: _cost(x, logs)).tolist()
    return LossLaw(
        irreducible=math.exp(log_e),
        parameter_scale=math.exp(log_a + alpha * centers[0]),
        token_scale=math.exp(log_b + beta * centers[1]),
        alpha=alpha,
        beta=beta,
    )
