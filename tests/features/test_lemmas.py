"""Lemma 3.1, Theorem 3.2, Propositions 4.1 and C.1 of the paper. Lemma 2.1 is in test_unbiased.py.

Statistical assertions allow 4 standard errors (two-sided error probability 6e-5 for one, under normality).
"""

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

from darkformer import ConfigError
from darkformer.diagnostics.bounds import log_mean_square, log_optimal_ratio, log_optimal_second_moment, sample_optimal
from darkformer.features.proposals import (
    expected_square,
    inadmissible,
    log_moment,
    optimal_covariance,
    shared_covariance,
    theorem32_covariance,
)
from darkformer.features.transforms import symmetric_power, whitening

EYE = torch.eye(3, dtype=torch.float64)


def spd(seed: int, low: float, high: float, dim: int = 3) -> Tensor:
    """A rotated matrix with evenly spaced eigenvalues from low to high."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    return (basis * torch.linspace(low, high, dim, dtype=torch.float64)) @ basis.T


def normal(count: int, covariance: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, len(covariance), generator=generator, dtype=torch.float64)
    return rows @ symmetric_power(covariance, 0.5)


def log_density(x: Tensor, covariance: Tensor) -> Tensor:
    """log N(x; 0, covariance) without the 2π."""
    return -0.5 * ((x @ covariance.inverse()) * x).sum(-1) - 0.5 * torch.linalg.slogdet(covariance).logabsdet


class TestLemma31:
    def test_no_other_proposal_on_the_same_points_has_a_smaller_second_moment(self) -> None:
        """On a finite set of ω the lemma is exact: Σ p²fg/ψ over distributions ψ is least at ψ ∝ p·√(fg)."""
        points = normal(200, EYE, 1)
        query, key = 0.6 * normal(50, spd(2, 0.2, 1.0), 3), 0.6 * normal(40, spd(4, 0.2, 1.0), 5)
        p = log_density(points, EYE).softmax(0)
        product = (log_mean_square(points, query) + log_mean_square(points, key)).exp()
        best = (p.log() + log_optimal_ratio(points, query, key)).softmax(0)

        def second_moment(proposal: Tensor) -> float:
            return float((p.square() * product / proposal).sum())

        least = second_moment(best)
        assert least == pytest.approx(float((p * product.sqrt()).sum()) ** 2, rel=1e-12)
        assert second_moment(p) > 1.01 * least
        generator = torch.Generator().manual_seed(0)
        for size in (0.01, 0.3):
            for _ in range(100):
                noise = size * torch.randn(200, generator=generator, dtype=torch.float64)
                other = (best.log() + noise).softmax(0)
                excess = second_moment(other) / least - 1  # χ² of the two distributions
                assert excess == pytest.approx(float((best.square() / other).sum()) - 1, rel=1e-6, abs=1e-12)
                assert excess > 0.2 * size**2

    def test_for_gaussian_data_it_is_theorem_32(self) -> None:
        """ψ*/p from samples against the density ratio of N(0, Σ*) and N(0, I), up to one constant."""
        covariance = spd(1, 0.05, 0.2)
        samples = normal(200_000, covariance, 2)
        points = normal(30, EYE, 3)
        ratio = log_optimal_ratio(points, samples, samples)
        expected = log_density(points, theorem32_covariance(covariance)) - log_density(points, EYE)
        difference = ratio - expected
        assert (difference - difference.mean()).abs().max() < 0.05 < expected.std()

    def test_the_mixture_of_both_sides_finds_the_normaliser(self) -> None:
        """Z² = (∫p√(fg))² for Gaussian q and k of different covariances is `expected_square` at the optimum."""
        query, key = spd(1, 0.05, 0.12), spd(2, 0.02, 0.15)
        best = theorem32_covariance(shared_covariance(query, key))
        expected = expected_square(best, query, key)
        found = log_optimal_second_moment(normal(4000, query, 3), normal(4000, key, 4), draws=4000)
        assert abs(found - expected) < 0.05
        same = normal(500, query, 5)
        assert abs(log_optimal_second_moment(same, same.clone()) - log_optimal_second_moment(same, same)) < 0.01

    def test_draws_are_from_the_optimum(self) -> None:
        """E_ψ*[p/ψ*] = 1, and E_ψ*[(p/ψ*)φ(x)φ(y)] = exp(xᵀy), with weights from `log_mean_square`."""
        x = 0.5 * normal(20, EYE, 1)
        omega = sample_optimal(x, 100_000, torch.Generator().manual_seed(2))
        normaliser = x.square().sum(-1).logsumexp(0) - torch.tensor(20.0).log()
        weight = (normaliser - log_mean_square(omega, x)).exp()
        features = (omega @ x.T - 0.5 * x.square().sum(-1)).exp()
        products = weight[:, None] * features[:, :5] * features[:, 5:10]
        for samples, expected in ((weight[:, None], torch.ones(1)), (products, (x[:5] * x[5:10]).sum(-1).exp())):
            error = samples.std(0) / len(samples) ** 0.5
            assert ((samples.mean(0) - expected).abs() <= 4 * error).all()
            assert (error < 0.02 * expected).all()


class TestTheorem32:
    def test_the_formula(self) -> None:
        covariance = spd(1, 0.05, 0.4)
        best = theorem32_covariance(covariance)
        assert relative_error(best @ (EYE - 2 * covariance), EYE + 2 * covariance) <= 1e-12
        assert relative_error(shared_covariance(covariance, covariance), covariance) <= 1e-12

    def test_the_expected_square_at_the_optimum_is_that_of_the_bound(self) -> None:
        """(E K(x, x))² = Π 1/(1 - 2λ), of "All Random Features Representations are Equivalent"."""
        covariance = spd(1, 0.05, 0.4)
        values = torch.linalg.eigvalsh(covariance)
        found = expected_square(theorem32_covariance(covariance), covariance, covariance)
        assert float(found) == pytest.approx(float(-(1 - 2 * values).log().sum()), rel=1e-10)

    @pytest.mark.parametrize("other", [None, 7], ids=["one Λ", "two Λ"])
    @pytest.mark.parametrize("size", [0.02, 0.3])
    def test_every_perturbed_covariance_is_worse(self, size: float, other: int | None) -> None:
        """In closed form, in 300 random directions: Σ = R·exp(size·D)·R with R = Σ*^½, D symmetric of norm 1."""
        query = spd(1, 0.05, 0.35)
        key = query if other is None else spd(other, 0.02, 0.3)
        best = theorem32_covariance(shared_covariance(query, key))
        least, root = expected_square(best, query, key), symmetric_power(best, 0.5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            direction = torch.randn(3, 3, generator=generator, dtype=torch.float64)
            direction = direction + direction.T
            factor = torch.linalg.matrix_exp(size * direction / direction.norm())
            assert expected_square(root @ factor @ root, query, key) > least + 0.02 * size**2

    @pytest.mark.parametrize("size", [0.3, 0.6])
    def test_monte_carlo_agrees(self, size: float) -> None:
        """The measured excess of perturbed Σ over Σ*: above zero, and the closed form's, within 4 standard errors.

        Draws of N(0, I) are shared by both (paired differences). Given ω the mean over q and k is in closed form.
        """
        covariance = spd(1, 0.05, 0.15)
        best = theorem32_covariance(covariance)
        root = symmetric_power(best, 0.5)
        isotropic = normal(400_000, EYE, 5)
        growth = 2 * covariance @ (EYE + 2 * covariance).inverse()  # log E φ² = ωᵀ·growth·ω - ½log|I + 2Λ|
        constant = torch.linalg.slogdet(EYE + 2 * covariance).logabsdet

        def squares(proposal: Tensor) -> Tensor:
            omega = isotropic @ torch.linalg.cholesky(proposal).T
            log_weight = log_density(omega, EYE) - log_density(omega, proposal)
            return (2 * log_weight + 2 * ((omega @ growth) * omega).sum(-1) - constant).exp()

        at_best = squares(best)
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            direction = torch.randn(3, 3, generator=generator, dtype=torch.float64)
            direction = direction + direction.T
            other = root @ torch.linalg.matrix_exp(size * direction / direction.norm()) @ root
            excess = squares(other) - at_best
            expected = (
                expected_square(other, covariance, covariance).exp()
                - expected_square(best, covariance, covariance).exp()
            )
            error = excess.std() / len(excess) ** 0.5
            assert excess.mean() > 4 * error
            assert (excess.mean() - expected).abs() <= 4 * error

    def test_the_error_names_the_eigenvalues(self) -> None:
        with pytest.raises(ConfigError, match=r"below 1/2; these are not: 0\.9, 0\.7\. proposal='optimal' exists"):
            theorem32_covariance(torch.diag(torch.tensor([0.1, 0.7, 0.9]).double()))
        heads = torch.stack([spd(1, 0.1, 0.4), torch.diag(torch.tensor([0.5, 0.2, 0.1]).double())])
        with pytest.raises(ConfigError, match=r"not: head 1: 0\.5\."):
            theorem32_covariance(heads)
        assert inadmissible(heads) == [[], [0.5]]
        assert torch.isinf(expected_square(EYE, *(spd(1, 0.1, 0.17),) * 2))  # λ > 1/6: isotropic draws have none
        assert torch.isfinite(expected_square(EYE, *(spd(1, 0.1, 0.16),) * 2))
        assert optimal_covariance(heads).isfinite().all()  # and the other proposal always exists


def test_proposition_41() -> None:
    """K_Σ from ω ~ N(0, Σ), and from isotropic ω weighted by p_Σ/p_I: one expectation, exp(qᵀΣk), two variances."""
    sigma = spd(1, 0.5, 1.1)
    query, key = 0.2 * normal(6, EYE, 2), 0.2 * normal(6, EYE, 3)
    isotropic = normal(400_000, EYE, 4)

    def features(omega: Tensor) -> Tensor:
        both = (query + key) @ omega.T - 0.5 * ((query @ sigma * query) + (key @ sigma * key)).sum(-1)[:, None]
        return both.exp().T

    sampled = features(isotropic @ symmetric_power(sigma, 0.5))
    weight = (log_density(isotropic, sigma) - log_density(isotropic, EYE)).exp()
    weighted = weight[:, None] * features(isotropic)
    expected = (query @ sigma * key).sum(-1).exp()
    z = (query + key) @ symmetric_power(sigma, 0.5)
    for samples, proposal in ((sampled, EYE), (weighted, sigma.inverse())):
        error = samples.std(0) / len(samples) ** 0.5
        assert ((samples.mean(0) - expected).abs() <= 4 * error).all()
        # The same formula for both, in the coordinates Σ^½q: see the module's docstring.
        predicted = expected.square() * (log_moment(proposal, z).exp() - 1)
        assert (samples.var(0) / predicted - 1).abs().max() < 0.1
    assert ((sampled.var(0) / weighted.var(0) - 1).abs() > 0.2).any()  # the variances do differ
    wrong = features(isotropic)  # without the weight it is another kernel
    assert ((wrong.mean(0) - expected).abs() > 8 * wrong.std(0) / len(wrong) ** 0.5).any()


class TestPropositionC1:
    def test_literal_makes_inputs_isotropic(self) -> None:
        covariance = torch.stack([spd(1, 0.3, 4.0), spd(2, 1.0, 2.0)])
        matrix = whitening(covariance, "literal")
        assert relative_error(matrix @ covariance @ matrix.mT, EYE.expand(2, -1, -1)) <= 1e-3  # regularised by 1e-4
        samples = normal(100_000, covariance[0], 3) @ matrix[0].T
        assert (torch.cov(samples.T) - EYE).abs().max() < 0.03

    def test_preserve_keeps_the_logits_mean_square(self) -> None:
        covariance = spd(1, 0.3, 4.0)
        query, key = normal(100_000, covariance, 3), normal(100_000, covariance, 4)
        before = (query * key).sum(-1).square().mean()
        after = {}
        for temperature in ("literal", "preserve"):
            matrix = whitening(covariance, temperature)
            after[temperature] = ((query @ matrix.T) * (key @ matrix.T)).sum(-1).square().mean()
            whitened = matrix @ covariance @ matrix.T
            assert relative_error(whitened, whitened[0, 0] * EYE) <= 1e-3  # isotropic at both temperatures
        assert (after["preserve"] / before - 1).abs() < 0.03
        assert (after["literal"] / 3 - 1).abs() < 0.03 and (before / 3 - 1).abs() > 1  # √d, and not what it was

    def test_the_temperature_must_be_named(self) -> None:
        with pytest.raises(ConfigError, match="choose literal or preserve"):
            whitening(EYE, "automatic")
