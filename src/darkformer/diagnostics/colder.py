"""Bias and variance of a colder kernel: features of exp(s²qᵀk), s < 1, in place of softmax's exp(qᵀk).

A colder kernel is biased, but its variance is exponentially smaller. Here both are predicted, for the normalised
output, from the keys' covariance and a sample of queries.

Assumptions, all of them:
    keys k ~ N(0, Λ), independent of each other, of the query and of their values; values independent with one variance;
    as many keys as it takes for Σ_j exp(qᵀk_j) to be near its mean (n well above exp(qᵀΛq));
    m independent draws ω ~ N(0, Σ) with weights p_I/ψ (orthogonal draws vary a little less).

Two predictions bracket the noise. The first-order one (`upper`) is exact for m → ∞, but its second moments are carried
by ω that no affordable m meets: it grows without bound, to infinity where the closed form diverges. The typical one
(`total`) counts draws as importance sampling does (Chatterjee & Diaconis 2018): given q the features' normalised sum
needs about exp(D) draws, D the divergence of the distribution ∝ p(ω)φ_ω(q)E_k φ_ω(k) from the proposal, and below
that the output is one draw's. It always exists, is a little low for many draws, and chooses the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError


class ColderError(NamedTuple):
    """Expected squared error of the output over the exact output's mean square; S scales, N queries."""

    bias: Tensor  # (S,)
    variance: Tensor  # (S,) to first order, of one draw; infinite where the closed form diverges
    spread: Tensor  # (S, N) the squared distance of one draw's output from the mean, times the query's share
    divergence: Tensor  # (S, N) nats: exp(this) is the number of draws that counts as one

    def upper(self, num_features: int) -> Tensor:
        """(S,) bias + first-order noise: exact for many features, far too much for few."""
        return self.bias + self.variance / num_features

    def total(self, num_features: int) -> Tensor:
        """(S,) bias + typical noise."""
        return self.bias + (self.spread / (1 + num_features * (-self.divergence).exp())).sum(-1)


def _log_gaussian_integral(outer: Tensor, linear: Tensor) -> Tensor:
    """log of |outer|^-½ exp(½ linᵀ outer⁻¹ lin) for linear (N, d): infinite unless `outer` is positive definite."""
    values, vectors = torch.linalg.eigh(outer)
    if not bool((values > 0).all()):
        return linear.new_full(linear.shape[:-1], torch.inf)
    return 0.5 * ((linear @ vectors).square() / values).sum(-1) - 0.5 * values.log().sum()


def _log_variances(query: Tensor, key: Tensor, covariance: Tensor, s: float) -> Tensor:
    """log of (E[a_j²ε_j²], E[a_j²ε_jε̄], E[a_j²ε̄²])·n·m over exp(qᵀΛq), each (N,): (3, N).

    ε_j is the relative error of key j's kernel, ε̄ that of the normaliser, a_j the colder weights. Integrating the
    keys first leaves ∫ p²/ψ·exp(2sωᵀq - s²‖q‖²)·exp(½ωᵀBω + ωᵀb + c) dω, a Gaussian integral in ω.
    """
    eye = torch.eye(key.shape[-1], dtype=key.dtype)
    tail = 2 * eye - torch.linalg.inv(covariance)
    base = 0.5 * torch.linalg.slogdet(covariance).logabsdet - s**2 * query.square().sum(-1)
    t = ((query @ key) * query).sum(-1)  # qᵀΛq; E_k exp(s²qᵀk) = exp(½s⁴t)

    def smoothed(factor: float) -> Tensor:
        """f·Λ(I + f·Λ)⁻¹."""
        return eye - torch.linalg.inv(eye + factor * key)

    own, shared = smoothed(2 * s**2), smoothed(s**2)
    log_own = -0.5 * torch.linalg.slogdet(eye + 2 * s**2 * key).logabsdet
    log_shared = -torch.linalg.slogdet(eye + s**2 * key).logabsdet
    x, pull = s * query, s * query @ shared
    squares = base + log_own + _log_gaussian_integral(tail - 2 * own, 2 * x) - s**4 * t
    crossed = base + log_shared + 0.5 * (pull * x).sum(-1) + _log_gaussian_integral(tail - 2 * shared, 2 * x + pull)
    means = base + log_shared + _log_gaussian_integral(tail - 2 * shared, 2 * x)
    return torch.stack([squares, crossed - 1.5 * s**4 * t, means])


def _log_spread(query: Tensor, key: Tensor, s: float) -> Tensor:
    """log of n·E Σ_j p_ω(j)² (N,), p_ω the attention of a single feature, ω from p·φ_ω(q)·E_k φ_ω(k) normalised.

    n·Σ_j p_ω(j)² is E_k φ²/(E_k φ)², so it is one more Gaussian integral, and one that never diverges.
    """
    eye = torch.eye(key.shape[-1], dtype=key.dtype)
    wide, wider = eye + s**2 * key, eye + 2 * s**2 * key
    growth = 2 * (eye - torch.linalg.inv(wider)) - (eye - torch.linalg.inv(wide))
    logdet = 0.5 * (torch.linalg.slogdet(wide).logabsdet - torch.linalg.slogdet(wider).logabsdet)
    t = ((query @ key) * query).sum(-1)
    constant = logdet - 0.5 * s**2 * query.square().sum(-1) - 0.5 * s**4 * t
    return constant + _log_gaussian_integral(eye - growth, s * query)


def _divergence(query: Tensor, key: Tensor, covariance: Tensor, s: float) -> Tensor:
    """KL of N((I + s²Λ)sq, I + s²Λ), which is ∝ p·φ_ω(q)·E_k φ_ω(k), from the proposal N(0, Σ): (N,) nats."""
    wide = torch.eye(key.shape[-1], dtype=key.dtype) + s**2 * key
    mean, inverse = s * query @ wide, torch.linalg.inv(covariance)
    logdet = torch.linalg.slogdet(covariance).logabsdet - torch.linalg.slogdet(wide).logabsdet
    return 0.5 * (((mean @ inverse) * mean).sum(-1) + (inverse * wide).sum() - len(key) + logdet)


def colder_error(
    query: Tensor,
    key_covariance: Tensor,
    scales: Sequence[float],
    proposals: Sequence[Tensor] | None = None,
    *,
    num_keys: int | None = None,
) -> ColderError:
    """Predicted bias and variance of the normalised output at every scale of the geometry.

    Args:
        query: a sample of queries (N, d), in the units of the features at scale 1 (√s·q, centred and balanced).
        key_covariance: Λ (d, d) of the keys in the same units.
        scales: factors s of queries and keys, above 0.
        proposals: one Σ (d, d) a scale, in the coordinates s·q, s·k; isotropic without.
        num_keys: n; a query's exact output then weighs no more than its greatest possible mean square.

    Returns:
        ColderError over the scales, float64. Every part is relative: 1 is the error of answering with the mean value.

    Raises:
        InputError: no queries, shapes that disagree, or a scale that is not above 0.
    """
    if query.dim() != 2 or not len(query) or key_covariance.shape != (query.shape[1],) * 2 or min(scales) <= 0:
        raise InputError(
            f"query {tuple(query.shape)}, key_covariance {tuple(key_covariance.shape)}, scales {tuple(scales)}: "
            "must be (N, d), (d, d) and numbers above 0."
        )
    query, key = query.double(), key_covariance.double()
    t = ((query @ key) * query).sum(-1)
    # A query counts by its exact output's mean square, exp(t)/n of the values' and 1 at the most.
    weights = (t if num_keys is None else t.clamp_max(math.log(num_keys))).softmax(0)
    bias, variance, spread, divergence = [], [], [], []
    for i, s in enumerate(scales):
        bias.append((weights * (1 - 2 * ((s**2 - 1) * t).exp() + ((s**4 - 1) * t).exp())).sum())
        covariance = torch.eye(len(key), dtype=key.dtype) if proposals is None else proposals[i].double()
        squares, crossed, means = (_log_variances(query, key, covariance, s) - t).exp()
        total = (weights * (squares - 2 * crossed + means)).sum()
        variance.append(total if bool(torch.isfinite(squares + crossed + means).all()) else total.new_tensor(torch.inf))
        one_draw = (_log_spread(query, key, s) - t).exp() - ((s**4 - 1) * t).exp()
        spread.append(weights * one_draw.clamp_min(0))
        divergence.append(_divergence(query, key, covariance, s))
    return ColderError(*(torch.stack(part) for part in (bias, variance, spread, divergence)))


def best_scale(error: ColderError, scales: Sequence[float], num_features: int) -> float:
    """The scale with the least predicted `total` error at m = num_features."""
    return float(scales[int(error.total(num_features).argmin())])
