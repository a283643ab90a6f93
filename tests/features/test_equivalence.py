"""All random feature representations are equivalent: two of them, sampled optimally, reach the one lower bound.

The representations are scalar features of exp(xᵀy): positive ones exp(ωᵀx - ½‖x‖²), and trigonometric ones
exp(½‖x‖²)·√2·cos(ωᵀx + b) with a random phase b. x and y are independent draws of the same finite sample, so every
expectation over them is an exact average; only ω (and b) are random.
"""

import math

import pytest
import torch
from torch import Tensor

from darkformer import InputError
from darkformer.research.bounds import (
    log_lower_bound,
    log_mean_kernel,
    log_mean_square,
    log_optimal_second_moment,
    sample_optimal,
)

DRAWS = 20_000


def sample(scale: float = 0.6) -> Tensor:
    return scale * torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def squared_errors(features: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Mean over all pairs of (w φ(x)φ(y) - K(x, y))², per draw. features (D, N), weight (D,)."""
    estimates = weight[:, None, None] * features[:, :, None] * features[:, None, :]
    return (estimates - (x @ x.T).exp()).square().mean((1, 2))


def positive(x: Tensor, optimal: bool) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    omega = torch.randn(DRAWS, 3, generator=generator, dtype=torch.float64)
    weight = torch.ones(DRAWS, dtype=torch.float64)
    if optimal:
        omega = sample_optimal(x, DRAWS, generator)
        weight = (log_mean_kernel(x) - log_mean_square(omega, x)).exp()
    return squared_errors((omega @ x.T - 0.5 * x.square().sum(-1)).exp(), weight, x)


def trigonometric(x: Tensor, optimal: bool) -> Tensor:
    """ψ* ∝ p(ω)·E_x[e^‖x‖²·2cos²(ωᵀx + b)]: pick x by e^‖x‖², ω ~ N(0, I), and the angle ωᵀx + b from 2cos²."""
    generator = torch.Generator().manual_seed(3)
    many = 4 * DRAWS
    omega = torch.randn(many, 3, generator=generator, dtype=torch.float64)
    angle = 2 * math.pi * torch.rand(many, generator=generator, dtype=torch.float64)
    growth = x.square().sum(-1)
    if optimal:
        accepted = torch.rand(many, generator=generator, dtype=torch.float64) < angle.cos().square()
        omega, angle = omega[accepted][:DRAWS], angle[accepted][:DRAWS]
        chosen = torch.multinomial(growth.softmax(0), DRAWS, replacement=True, generator=generator)
        phase = angle - (omega * x[chosen]).sum(-1)
    else:
        omega, phase = omega[:DRAWS], angle[:DRAWS]
    features = (0.5 * growth).exp() * math.sqrt(2) * (omega @ x.T + phase[:, None]).cos()
    weight = growth.exp().mean() / features.square().mean(1) if optimal else torch.ones(DRAWS).double()
    return squared_errors(features, weight, x)


@pytest.mark.parametrize("features", [positive, trigonometric])
def test_optimal_sampling_reaches_the_bound(features: object) -> None:
    """Within 4 standard errors and 1 %; sampled from p instead, the same features are far above it."""
    x = sample()
    bound = float(log_lower_bound(x, x).exp())
    errors = features(x, optimal=True)
    standard = float(errors.std()) / DRAWS**0.5
    assert abs(float(errors.mean()) - bound) <= 4 * standard
    assert standard < 0.01 * bound
    naive = features(x, optimal=False)
    assert float(naive.mean()) > 1.15 * bound


def test_the_bound_is_its_formula() -> None:
    x = sample()
    kernel = (x @ x.T).exp()
    expected = float(kernel.diagonal().mean() ** 2 - kernel.square().mean())
    assert float(log_lower_bound(x, x).exp()) == pytest.approx(expected, rel=1e-10)


def test_no_overflow() -> None:
    """Norms of real heads: exp(‖x‖²) is far outside float64, its logarithm is not."""
    directions = sample() / sample().norm(dim=1, keepdim=True)
    x = 40.0 * directions
    assert (2 * x @ x.T).exp().isinf().any()
    # K(x, x) = e^1600 for all, and K(x, y) is nothing beside it: Z² = e^3200, E K² = e^3200/12.
    assert float(log_lower_bound(x, x)) == pytest.approx(3200 + math.log(11 / 12), rel=1e-9)
    assert float(log_lower_bound(x, 30.0 * directions)) == pytest.approx(2400 + math.log(11 / 12), abs=0.1)
    alone = torch.full((1, 3), 20.0, dtype=torch.float64)
    assert float(log_lower_bound(alone, alone)) == -math.inf  # one point: a weighted draw has no error at all
    assert float(log_lower_bound(0 * x, 0 * x.clone())) == -math.inf


def test_two_distributions() -> None:
    """For queries and keys apart it is Lemma 3.1's optimum, which a discrete search over ω cannot beat."""
    query, key = sample(), 0.3 * sample() + 0.4
    found = float(log_optimal_second_moment(query, key, draws=40_000))
    omega = torch.randn(400_000, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    root = (0.5 * (log_mean_square(omega, query) + log_mean_square(omega, key))).exp()
    z, error = float(root.mean()), float(root.std()) / len(root) ** 0.5
    assert abs(math.exp(found / 2) - z) <= 4 * error + 0.01 * z
    assert found < float(log_mean_kernel(query) + log_mean_kernel(key))  # Cauchy-Schwarz
    assert float(log_lower_bound(query, key)) < found


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((4, 3), (4, 2)), ((0, 3), (4, 3))])
def test_wrong_samples(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="must be samples"):
        log_lower_bound(*(torch.zeros(shape) for shape in shapes))
