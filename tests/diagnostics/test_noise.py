"""Noise of the attention output: predictions against features that are really drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from darkformer import DarkConfig
from darkformer.calibration.moments import Moments
from darkformer.diagnostics.estimators import (
    ESTIMATORS,
    balanced_covariance,
    estimator_map,
    measured_log_moment,
    predicted_log_moment,
    spectrum,
)
from darkformer.diagnostics.noise import Draws, output_noise, sample_draws, typical_noise
from darkformer.diagnostics.summary import rank_correlation, ranks

D, LENGTH = 4, 60


def _inputs(scale: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(LENGTH, D, generator=generator, dtype=torch.float64) for _ in range(3))
    weight = 0.3 * torch.randn(LENGTH, generator=generator, dtype=torch.float64)
    return scale * query, scale * key, value, weight


def _measured(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, at: Tensor, m: int, runs: int) -> Tensor:
    """Squared error of the output with m isotropic draws over its mean square, one number a run."""
    seen = torch.arange(LENGTH) <= at[:, None]
    exact = (query @ key.mT + weight).masked_fill(~seen, -torch.inf).softmax(-1) @ value
    generator = torch.Generator().manual_seed(99)
    errors = []
    for _ in range(runs):
        omega = torch.randn(m, D, generator=generator, dtype=torch.float64)
        phi_q = (query @ omega.mT - 0.5 * query.square().sum(-1, keepdim=True)).exp()
        phi_k = (key @ omega.mT - 0.5 * key.square().sum(-1, keepdim=True) + weight[:, None]).exp()
        weights = (phi_q @ phi_k.mT) * seen
        output = weights @ value / weights.sum(-1, keepdim=True)
        errors.append((output - exact).square().sum(-1).mean() / exact.square().sum(-1).mean())
    return torch.stack(errors)


def _noise(scale: float, draws: int = 20_000) -> tuple:
    """First-order noise, draws and exact output; the inputs of `_measured`."""
    query, key, value, weight = _inputs(scale)
    at = torch.arange(10, LENGTH, 7)
    seen = torch.arange(LENGTH) <= at[:, None]
    exact = (query[at] @ key.mT + weight).masked_fill(~seen, -torch.inf).softmax(-1) @ value
    found = sample_draws(query[at], key, value, weight, seen, draws=draws, generator=torch.Generator().manual_seed(1))
    return output_noise(found, exact), found, exact, (query[at], key, value, weight, at)


def _typical(found: Draws, exact: Tensor, m: int) -> float:
    noise = typical_noise(found, exact, torch.ones(len(exact), dtype=torch.float64), [m])
    return float(noise.mean() / exact.square().sum(-1).mean())


def test_first_order_noise_is_the_measured_one_for_many_features() -> None:
    noise, *_, inputs = _noise(0.5)
    errors = _measured(*inputs, m=1000, runs=200)
    standard_error = errors.std() / len(errors) ** 0.5
    assert abs(errors.mean() - noise.first_order / 1000) < 4 * standard_error + 0.05 * noise.first_order / 1000


@pytest.mark.parametrize("scale", [0.3, 0.6, 0.9])
def test_no_proposal_beats_the_bound(scale: float) -> None:
    noise, *_ = _noise(scale)
    assert 0 < noise.bound <= noise.first_order


def test_a_single_draws_output_averages_to_the_exact_one() -> None:
    _, found, exact, _ = _noise(0.6, draws=50_000)
    mean = (found.own[..., None] * found.output).sum(0)
    assert torch.allclose(mean, exact, atol=0.05)
    assert float(found.divergence.min()) > 0


def test_the_bound_of_one_query_is_below_its_spread() -> None:
    query, key, value, weight = _inputs(0.6)
    seen = torch.arange(LENGTH)[None] <= 40
    exact = (query[40:41] @ key.mT + weight).masked_fill(~seen, -torch.inf).softmax(-1) @ value
    generator = torch.Generator().manual_seed(2)
    found = sample_draws(query[40:41], key, value, weight, seen, draws=50_000, generator=generator)
    bound = output_noise(found, exact).bound
    spread = float((found.own * (found.output - exact).square().sum(-1)).sum() / exact.square().sum())
    # With one query the bound is (E_ψ₀ ‖o_ω - o‖)², and the spread is E_ψ₀ ‖o_ω - o‖²: Jensen's gap in between.
    assert 0.5 * spread < bound < spread


@pytest.mark.parametrize(("scale", "m"), [(0.5, 16), (1.0, 64), (1.5, 64)])
def test_the_typical_error_is_near_the_measured_one(scale: float, m: int) -> None:
    _, found, exact, inputs = _noise(scale)
    measured = float(_measured(*inputs, m=m, runs=60).mean())
    assert measured / 2.5 < _typical(found, exact, m) < 2.5 * measured


def test_with_many_features_the_error_lies_between_the_typical_one_and_the_first_order() -> None:
    noise, found, exact, inputs = _noise(0.5)
    measured = float(_measured(*inputs, m=256, runs=60).mean())
    assert _typical(found, exact, 256) < measured < noise.first_order / 256


def _moments(scale: float) -> tuple[Moments, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = torch.tensor([1.5, 1.0, 0.6, 0.3], dtype=torch.float64) * scale
    query, key = (torch.randn(1, 1, 2000, D, generator=generator, dtype=torch.float64) * shape + 0.2 for _ in range(2))
    moments = Moments(1, D)
    keep = torch.ones(1, 2000, dtype=torch.bool)
    moments.add("query", query, keep)
    moments.add("key", key, keep)
    return moments, query[0], key[0]


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_predicted_second_moments_are_the_measured_ones(name: str) -> None:
    moments, query, key = _moments(0.5)
    fm = estimator_map(name, moments, 1, layer=0, heads=1, seed=0)
    scale = 0.6 if name == "whitened" else 1.0
    measured = measured_log_moment(fm, query, key, scale=scale, draws=20_000, seed=0)
    # E[L] is linear in E[zzᵀ], and the sample's own moments stand for it: only the draws are random.
    assert float(predicted_log_moment(fm, moments, scale)) == pytest.approx(float(measured), rel=0.1, abs=0.02)


def test_balancing_and_proposals_lower_the_second_moment() -> None:
    moments, *_ = _moments(1.0)
    value = {
        n: float(predicted_log_moment(estimator_map(n, moments, 1, layer=0, heads=1, seed=0), moments))
        for n in ESTIMATORS
    }
    assert value["optimal"] <= value["oprf"] <= value["performer"]
    assert value["balanced-optimal"] <= value["balanced"] <= value["centered"] <= value["performer"]


def test_balanced_covariance_is_what_balancing_gives() -> None:
    moments, query, _ = _moments(1.0)
    fm = estimator_map("balanced", moments, 1, layer=0, heads=1, seed=0)
    p = fm.parameters_for(torch.float64)
    assert p.query_map is not None and p.query_center is not None
    y = (query - p.query_center[:, None]) @ p.query_map.mT
    values = torch.linalg.eigvalsh(y.mT @ y / y.shape[1])
    expected = torch.linalg.eigvalsh(balanced_covariance(moments))
    assert torch.allclose(values, expected, rtol=1e-3)


def test_spectrum_of_an_isotropic_head() -> None:
    found = spectrum(torch.eye(8, dtype=torch.float64)[None])
    assert found["effective_rank"][0] == pytest.approx(8)
    assert found["condition"][0] == pytest.approx(1)
    narrow = spectrum(torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))[None])
    assert narrow["effective_rank"][0] == pytest.approx(1, abs=1e-6)


def test_rank_correlation() -> None:
    assert ranks([3.0, 1.0, 1.0]).tolist() == [2.0, 0.5, 0.5]
    assert rank_correlation([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2], [1, 2]) != rank_correlation([1, 2], [1, 2])  # nan


def test_the_library_has_a_configuration_for_every_estimator() -> None:
    for estimator in ESTIMATORS.values():
        config = DarkConfig.paper(16, **estimator.changes)
        assert {name: getattr(config, name) for name in estimator.changes} == estimator.changes
    assert len({estimator.title for estimator in ESTIMATORS.values()}) == len(ESTIMATORS)
