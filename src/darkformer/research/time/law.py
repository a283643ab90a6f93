"""A loss law in parameters and tokens, and the same law in parameters and seconds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InputError

#: Starts of the fit: by how much log E lies below the least log loss, and both exponents. The best end is kept.
STARTS = tuple(itertools.product((0.05, 0.5), (0.3, 0.6)))
#: Share of the least loss that both reducible terms start with.
REDUCIBLE = 0.15
#: Residual of log loss from which on it counts linearly, so that one bad run does not bend the law.
HUBER = 1e-2
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


def _minimised(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where L-BFGS ends from a start."""
    x = start.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = function(x)
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    return x.detach()


def fit_law(runs: Sequence[Observation]) -> LossLaw:
    """Coefficients by Huber's loss on log losses, L-BFGS from a grid of starts, as Hoffmann et al. fit theirs.

    Raises:
        InputError: too few runs, or all of one size or one length.
    """
    if len(runs) < FEWEST or len({x.parameters for x in runs}) < 2 or len({x.tokens for x in runs}) < 2:
        raise InputError(
            f"{len(runs)} runs for a law with five coefficients: give at least {FEWEST}, of two sizes and two lengths."
        )
    columns = torch.tensor(runs, dtype=torch.float64).T
    # Exponents and scales are then of order one: N^-α is fitted in units of the geometric means.
    centers = columns[:2].log().mean(1)
    sizes, lengths = (columns[:2].log() - centers[:, None]).unbind()
    target = columns[2].log()

    def residual(x: Tensor) -> Tensor:
        log_a, log_b, log_e, alpha, beta = x.unbind()
        terms = [log_a - alpha * sizes, log_b - beta * lengths, log_e.expand_as(target)]
        return torch.nn.functional.huber_loss(torch.stack(terms).logsumexp(0), target, delta=HUBER)

    level = float(columns[2].min().log())
    part = level + math.log(REDUCIBLE)
    ends = []
    for below, exponent in STARTS:
        start = torch.tensor([part, part, level - below, exponent, exponent], dtype=torch.float64)
        ends.append(_minimised(residual, start))
    best = min(ends, key=lambda x: float(residual(x)))
    log_a, log_b, log_e, alpha, beta = best.tolist()
    return LossLaw(
        math.exp(log_e), math.exp(log_a + alpha * float(centers[0])), math.exp(log_b + beta * float(centers[1])),
        alpha, beta,
    )  # fmt: skip
