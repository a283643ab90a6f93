"""The least variance any draw of random features can have, estimated from samples of queries and keys.

Lemma 3.1: among all proposals ψ, the expected second moment ∫ p²/ψ·E_q[φ_ω(q)²]·E_k[φ_ω(k)²] dω is smallest for
ψ* ∝ p·√(E_q φ²·E_k φ²), where it is the square of Z = ∫ p·√(E_q φ²·E_k φ²). For q and k of one distribution
Z = E_x K(x, x), whatever the features: "All Random Features Representations are Equivalent" (Sernau et al. 2024).
Samples stand for their empirical distribution, with q and k independent. Everything is in the log domain: float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..features.proposals import log_moment


def log_mean_square(projection: Tensor, x: Tensor) -> Tensor:
    """log E_x[φ_ω(x)²] at the rows ω of `projection` (…, m, d) over samples x (…, N, d): (…, m)."""
    exponents = 2 * projection @ x.mT - x.square().sum(-1)[..., None, :]
    return exponents.logsumexp(-1) - math.log(x.shape[-2])


def log_optimal_ratio(projection: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """log ψ*(ω)/p(ω) of Lemma 3.1 up to its constant log Z: ½ log E_q φ² + ½ log E_k φ², (…, m).

    Args:
        projection: rows ω (…, m, d). query, key: samples (…, N, d), (…, N', d) in the units of the features.
    """
    return 0.5 * (log_mean_square(projection, query) + log_mean_square(projection, key))


def sample_optimal(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Exact draws (count, d) from ψ* ∝ p·E_x[φ_ω(x)²], the optimum when q and k are both like the samples x (N, d).

    p(ω)·exp(2ωᵀx - ‖x‖²) is exp(‖x‖²)·N(2x, I): ψ* is a mixture of Gaussians at 2x with these weights.
    """
    weights = x.square().sum(-1).softmax(-1)
    chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
    return 2 * x[chosen] + torch.randn(count, x.shape[-1], generator=generator, dtype=x.dtype)


def log_mean_kernel(x: Tensor) -> Tensor:
    """log E_x K(x, x) over samples (…, N, d): what one optimally drawn feature has for its root mean square."""
    return x.square().sum(-1).logsumexp(-1) - math.log(x.shape[-2])


def _log_mean_feature(projection: Tensor, x: Tensor) -> Tensor:
    """log E_x[φ_ω(x)] at rows ω (…, m, d): (…, m)."""
    return (projection @ x.mT - 0.5 * x.square().sum(-1)[..., None, :]).logsumexp(-1) - math.log(x.shape[-2])


def _sample_overlap(query: Tensor, key: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws (count, d) from p·E_q[φ]·E_k[φ] normalised: a mixture of N(q + k, I) with weights exp(qᵀk)."""
    weights = (query @ key.mT).flatten().softmax(0)
    chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
    centers = query[chosen // len(key)] + key[chosen % len(key)]
    return centers + torch.randn(count, query.shape[-1], generator=generator, dtype=query.dtype)


def log_optimal_second_moment(
    query: Tensor, key: Tensor, *, draws: int = 4096, generator: torch.Generator | None = None
) -> Tensor:
    """log Z², the expected second moment at the optimal proposal, for samples (N, d) and (N', d), N·N' < 2^24.

    One tensor given twice is in closed form. Otherwise Z is estimated with `draws` from an even mixture of p·E_q φ²,
    p·E_k φ² and p·E_q φ·E_k φ: beside the first two the integrand is bounded, and beside the third it is at least 1,
    so distant queries and keys are no special case.
    """
    log_query, log_key = log_mean_kernel(query), log_mean_kernel(key)
    if query is key:
        return 2 * log_query
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    share = -(-draws // 3)
    projection = torch.cat(
        [*(sample_optimal(x, share, generator) for x in (query, key)), _sample_overlap(query, key, share, generator)]
    )
    log_pair = (query @ key.mT).flatten().logsumexp(0) - math.log(len(query) * len(key))
    f, g = log_mean_square(projection, query), log_mean_square(projection, key)
    h = _log_mean_feature(projection, query) + _log_mean_feature(projection, key)
    mixture = torch.stack([f - log_query, g - log_key, h - log_pair]).logsumexp(0) - math.log(3)
    return 2 * ((0.5 * (f + g) - mixture).logsumexp(0) - math.log(len(projection)))


def log_lower_bound(
    query: Tensor, key: Tensor, *, draws: int = 4096, generator: torch.Generator | None = None
) -> Tensor:
    """log of (Z² - E K(q, k)²), m times the least expected squared error of m independent random features.

    Args:
        query: samples (N, d) in the units of the features. key: (N', d). The same tensor twice: (E K(x, x))² - E K²,
            which no representation of the kernel beats; otherwise it is the least that positive features reach.

    Returns:
        A scalar; -inf if the error is zero (all samples equal to zero).

    Raises:
        InputError: shapes other than (N, d) with one d, or no samples.
    """
    if query.dim() != 2 or key.dim() != 2 or query.shape[1] != key.shape[1] or 0 in (len(query), len(key)):
        raise InputError(f"query {tuple(query.shape)}, key {tuple(key.shape)}: must be samples (N, d) of one d.")
    query, key = (query.double(),) * 2 if query is key else (query.double(), key.double())
    best = log_optimal_second_moment(query, key, draws=draws, generator=generator)
    pairs = math.log(len(query)) + math.log(len(key))
    square = (2 * query @ key.mT).flatten().logsumexp(0) - pairs
    # log(e^best - e^square); square ≤ best by the Cauchy-Schwarz inequality, up to the error of the draws.
    return best + torch.log(-torch.expm1((square - best).clamp_max(0)))


class Optimality(NamedTuple):
    """How far estimators of exp(qᵀk) are from the least error that any draws can have; logarithms, in nats."""

    log_least: float  # of the least expected squared error of one draw, over E K²; over m it is that of m draws
    log_times_bound: dict[str, float]  # by proposal, of its expected squared error over the least


def log_proposal_moment(covariance: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """log of the expected second moment of one weighted draw from N(0, Σ), over all pairs of queries and keys.

    Args:
        covariance: Σ (d, d). query, key: samples (N, d), (N', d) in the units of the features.

    Returns:
        A scalar; infinite where the proposal's tails are too light.
    """
    pairs = (query[:, None] + key).flatten(0, 1)
    exponents = log_moment(covariance, pairs) + 2 * (query @ key.mT).flatten()
    return exponents.logsumexp(0) - math.log(len(pairs))


def optimality(
    query: Tensor, key: Tensor, proposals: Mapping[str, Tensor], *, draws: int = 4096,
    generator: torch.Generator | None = None,
) -> Optimality:  # fmt: skip
    """The bound for samples of queries (N, d) and keys (N', d), and how far above it Gaussian proposals are.

    Args:
        proposals: name → Σ (d, d), drawn from with the weight p/ψ. draws: for the bound's integral.

    Raises:
        InputError: as `log_lower_bound`.
    """
    query, key = query.double(), key.double()
    bound = log_lower_bound(query, key, draws=draws, generator=generator)
    square = (2 * query @ key.mT).flatten().logsumexp(0) - math.log(len(query) * len(key))
    above = {}
    for name, covariance in proposals.items():
        moment = log_proposal_moment(covariance.double(), query, key)
        error = moment + torch.log(-torch.expm1((square - moment).clamp_max(0)))
        above[name] = max(0.0, float(error - bound))  # below 0 it is the error of the bound's draws
    return Optimality(float(bound - square), above)
