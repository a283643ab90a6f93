"""Noise of the attention output of one query head: what a draw ω gives, the least any proposal can have, what m give.

The features stand for the keys in `far`. For query t a single draw ω answers with o_ω,t, the mean of those values
with weights φ_ω(k_j), and the whole far part is the mean of o_ω,t over the density π_t ∝ p·φ_ω(q_t) Σ_j φ_ω(k_j). π_t
is a mixture of Gaussians, N(q_t + k_j, I) with the kernel's weights. Every integral is taken over one set of draws
from ψ₀, the even mixture of the π_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """S draws from ψ₀, seen from T queries; float64."""

    log_density: Tensor  # (S, T) log π_t/p
    output: Tensor  # (S, T, d_v) o_ω,t

    @property
    def log_mixture(self) -> Tensor:
        """(S,) log ψ₀/p."""
        return self.log_density.logsumexp(-1) - torch.tensor(float(self.log_density.shape[1])).log()

    @property
    def own(self) -> Tensor:
        """(S, T) weights that turn the draws into ones of π_t: every column sums to 1."""
        return (self.log_density - self.log_mixture[:, None]).softmax(0)

    @property
    def divergence(self) -> Tensor:
        """(T,) nats: KL of π_t from p = N(0, I); exp(this) isotropic draws count as one."""
        return (self.own * self.log_density).sum(0)


class OutputNoise(NamedTuple):
    """Squared errors over the exact output's mean square, times m."""

    bound: float  # the least to first order
    first_order: float  # with isotropic draws


def sample_draws(
    query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor, far: Tensor, *, draws: int,
    generator: torch.Generator,
) -> Draws:  # fmt: skip
    """Draws for `query` (T, d) over the keys `far` (T, L) of `key` (L, d), `value` (L, d_v).

    All float64, in the coordinates of the features (centred, balanced, scaled), where the kernel's logarithm is
    qᵀk + log_weight up to terms without the key; log_weight (L,) is what centring put on the keys, zero without. Every
    query needs at least one far key.
    """
    logits = (query @ key.mT + log_weight).masked_fill(~far, -torch.inf)  # (T, L)
    weights, log_z = logits.softmax(-1), logits.logsumexp(-1)
    chosen = torch.randint(len(query), (draws,), generator=generator)
    picked = torch.multinomial(weights[chosen], 1, generator=generator)[:, 0]
    centers = query[chosen] + key[picked]
    omega = centers + torch.randn(centers.shape, generator=generator, dtype=centers.dtype)  # (S, d)
    lq = omega @ query.mT - 0.5 * query.square().sum(-1)  # (S, T)
    lk = omega @ key.mT - 0.5 * key.square().sum(-1) + log_weight  # (S, L)
    top = lk.amax(-1, keepdim=True)
    features = (lk - top).exp()
    log_density, output = torch.empty_like(lq), lq.new_empty(*lq.shape, value.shape[-1])
    for t in range(len(query)):
        part = features * far[t]
        total = part.sum(-1).clamp_min(1e-300)
        output[:, t] = (part @ value) / total[:, None]
        log_density[:, t] = lq[:, t] + top[:, 0] + total.log() - log_z[t]
    return Draws(log_density, output)


def output_noise(draws: Draws, exact: Tensor) -> OutputNoise:
    """First-order noise where the features do all of attention, `exact` (T, d_v) its exact output.

    With r_t = π_t/p the squared error with m independent draws from ψ is V_ψ/m to first order in 1/m, V_ψ =
    E_ψ[(p/ψ)² E_t r_t² ‖o_ω,t - o_t‖²]. It is least for ψ* ∝ p·√(E_t r_t²‖o_ω,t - o_t‖²), where it is (∫ p·√…)²: no
    proposal does better, whatever the model (Lemma 3.1 for the output).
    """
    distance = (draws.output - exact).square().sum(-1).clamp_min(1e-300)
    count = torch.tensor(float(len(exact)))
    inner, mixture = (2 * draws.log_density + distance.log()).logsumexp(-1) - count.log(), draws.log_mixture
    scale = exact.square().sum(-1).mean()
    return OutputNoise(
        bound=float((0.5 * inner - mixture).exp().mean().square() / scale),
        first_order=float((inner - mixture).exp().mean() / scale),
    )


def typical_noise(draws: Draws, expected: Tensor, share: Tensor, counts: Sequence[int]) -> Tensor:
    """(len(counts), T) squared distance of the output with m isotropic draws from `expected`, m in `counts`.

    m draws count as m·exp(-divergence), and fewer than one as one. This is the typical error, not its mean: where m is
    well above exp(divergence) rare draws carry more than it says, and the error lies between both.

    Args:
        expected: (T, d_v) the whole output with infinitely many features.
        share: (T,) the features' share of the normaliser, 1 without an exact part.
    """
    own = draws.own
    spread = share.square() * (own * (draws.output - expected).square().sum(-1)).sum(0)
    count = torch.tensor(counts, dtype=torch.float64)[:, None]
    return spread / (1 + count * (-draws.divergence).exp())
