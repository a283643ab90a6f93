"""First-order noise of the attention output for any proposal, and the least there is: Lemma 3.1 for the output.

For a query t and a draw ω let r_t(ω) = φ_ω(q_t) Σ_j φ_ω(k_j)/Z_t, Z_t the exact normaliser, and o_ω,t the output that
this single feature gives. To first order in 1/m the squared error of the output with m independent draws from ψ is
V_ψ/m, V_ψ = E_ψ[(p/ψ)² E_t r_t² ‖o_ω,t - o_t‖²]. It is least for ψ* ∝ p·√(E_t r_t²‖o_ω,t - o_t‖²), where it is
(∫ p·√…)²: no proposal does better, whatever the model. Every integral is taken over one set of draws from the even
mixture over queries of the densities p·r_t, which are Gaussian mixtures: N(q_t + k_j, I) with softmax's weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OutputNoise(NamedTuple):
    """Of one query head; squared errors relative to the exact output's mean square."""

    bound: float  # m times the least first-order error
    first_order: float  # V_ψ for isotropic draws
    spread: Tensor  # (T,) squared error of a single draw's output, drawn from p·r_t
    divergence: Tensor  # (T,) nats: KL of p·r_t from N(0, I); exp(this) draws count as one


def output_noise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_weight: Tensor,
    positions: Tensor,
    *,
    draws: int,
    generator: torch.Generator,
) -> OutputNoise:
    """Noise of causal attention of `query` (T, d) at token `positions` (T,) over `key` (L, d), `value` (L, d_v).

    All float64, in the coordinates of the features (centred, balanced), where softmax's logits are qᵀk + log_weight
    up to terms without the key; log_weight (L,) is what centring put on the keys, zero without.
    """
    seen = torch.arange(len(key)) <= positions[:, None]
    logits = (query @ key.mT + log_weight).masked_fill(~seen, -torch.inf)  # (T, L)
    attention, log_z = logits.softmax(-1), logits.logsumexp(-1)
    exact = attention @ value
    scale = exact.square().sum(-1).mean()
    chosen = torch.randint(len(query), (draws,), generator=generator)
    picked = torch.multinomial(attention[chosen], 1, generator=generator)[:, 0]
    centers = query[chosen] + key[picked]
    omega = centers + torch.randn(centers.shape, generator=generator, dtype=centers.dtype)  # (S, d)
    lq = omega @ query.mT - 0.5 * query.square().sum(-1)  # (S, T)
    lk = omega @ key.mT - 0.5 * key.square().sum(-1) + log_weight  # (S, L)
    top = lk.amax(-1, keepdim=True)
    weights = (lk - top).exp()
    log_ratio, distance = torch.empty_like(lq), torch.empty_like(lq)
    for t in range(len(query)):
        part = weights * seen[t]
        total = part.sum(-1).clamp_min(1e-300)
        output = (part @ value) / total[:, None]
        log_ratio[:, t] = lq[:, t] + top[:, 0] + total.log() - log_z[t]
        distance[:, t] = (output - exact[t]).square().sum(-1)
    mixture = log_ratio.logsumexp(-1) - torch.tensor(float(len(query))).log()  # log ψ₀/p
    inner = (2 * log_ratio + distance.clamp_min(1e-300).log()).logsumexp(-1) - torch.tensor(float(len(query))).log()
    bound = (0.5 * inner - mixture).exp().mean().square() / scale
    first_order = (inner - mixture).exp().mean() / scale
    own = (log_ratio - mixture[:, None]).softmax(0)  # reweighs the draws to p·r_t, one column a query
    return OutputNoise(
        bound=float(bound),
        first_order=float(first_order),
        spread=(own * distance).sum(0) / scale,
        divergence=(own * log_ratio).sum(0),
    )


def expected_error(noise: OutputNoise, num_features: int) -> float:
    """Predicted squared error: a query's m draws count as m·exp(-divergence), and fewer than one as one.

    The typical error, not its mean: where m is well above exp(divergence) rare draws still carry noise that this
    leaves out, and the error lies between it and `first_order`/m.
    """
    return float((noise.spread / (1 + num_features * (-noise.divergence).exp())).mean())
