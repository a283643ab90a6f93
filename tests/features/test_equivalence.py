"""All random feature representations are equivalent: each, drawn from its own best distribution, reaches one bound.

x and y are independent draws of the same finite sample, so every expectation over them is an exact average; only the
features' draws are random.
"""

import math

import pytest
import torch
from torch import Tensor

from darkformer import InputError
from darkformer.diagnostics.bounds import (
    log_lower_bound,
    log_mean_kernel,
    log_mean_square,
    log_optimal_second_moment,
    log_proposal_moment,
    optimality,
)
from darkformer.features.proposals import optimal_covariance
from darkformer.research.representations import REPRESENTATIONS, error_over_bound

DRAWS = 20_000
EYE = torch.eye(3, dtype=torch.float64)


def sample(scale: float = 0.6) -> Tensor:
    return scale * torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_a_representation_estimates_the_kernel(name: str) -> None:
    """Without bias, drawn from p and from its best distribution: within 5 standard errors at every pair."""
    x = sample(0.4)
    squares = x.square().sum(-1)
    for optimal in (False, True):
        generator = torch.Generator().manual_seed(4)
        chosen = x[torch.multinomial(squares.softmax(0), DRAWS, replacement=True, generator=generator)]
        found = REPRESENTATIONS[name](x, chosen, optimal, generator)
        features = found.sign * found.log_size.exp()
        weight = squares.exp().mean() / features.square().mean(1) if optimal else torch.ones(DRAWS).double()
        products = weight[:, None, None] * features[:, :, None] * features[:, None, :]
        error = products.std(0) / DRAWS**0.5
        assert bool(((products.mean(0) - (x @ x.T).exp()).abs() <= 5 * error).all())


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_optimal_sampling_reaches_the_bound(name: str) -> None:
    """Within 4 standard errors and 1 %; drawn from p instead, the same features are far above it."""
    x = sample()
    best = error_over_bound(name, x, optimal=True, draws=DRAWS, generator=torch.Generator().manual_seed(2))
    assert abs(best.ratio - 1) <= 4 * best.standard_error
    assert best.standard_error < 0.01
    naive = error_over_bound(name, x, optimal=False, draws=DRAWS, generator=torch.Generator().manual_seed(2))
    assert naive.ratio > 1.15


def test_the_error_of_a_proposal_is_measured() -> None:
    """`log_proposal_moment` against weighted draws, and no proposal below the bound."""
    query, key = sample(0.3), 0.4 * sample() + 0.1
    pairs = query[:, None] + key
    covariance = optimal_covariance((pairs[..., :, None] * pairs[..., None, :]).mean((0, 1)))
    proposals = {"isotropic": EYE, "optimal": covariance, "narrow": 0.51 * EYE}
    found = optimality(query, key, proposals)
    square = float((2 * query @ key.T).exp().mean())
    for name in ("isotropic", "optimal"):
        root = torch.linalg.cholesky(proposals[name])
        isotropic = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        omega = isotropic @ root.T
        weight = 0.5 * (isotropic.square() - omega.square()).sum(-1) + root.diagonal().log().sum()
        moments = (2 * weight + log_mean_square(omega, query) + log_mean_square(omega, key)).exp()
        predicted = float(log_proposal_moment(proposals[name], query, key).exp())
        assert abs(float(moments.mean()) - predicted) <= 4 * float(moments.std()) / 100_000**0.5
        above = (predicted - square) / (square * math.exp(found.log_least))
        assert math.exp(found.log_times_bound[name]) == pytest.approx(above)
    assert 0 < found.log_times_bound["optimal"] < found.log_times_bound["isotropic"] < found.log_times_bound["narrow"]


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
