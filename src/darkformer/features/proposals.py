"""Gaussian proposals N(0, Σ) for the features' draws, and the second moments that tell them apart.

For z = q + k and weights p_I/ψ, one draw's relative second moment is, in closed form,
E_ψ[(w φ(q)φ(k))²] / exp(2qᵀk) = |Σ|^½ |2I - Σ⁻¹|^-½ exp(zᵀ(2(2I - Σ⁻¹)⁻¹ - I)z); for Σ = I it is exp(‖z‖²).
Everything here works on symmetric (…, d, d) matrices through their eigenvalues.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ConfigError
from .transforms import symmetric_power

#: How the features' directions are drawn.
PROPOSALS: dict[str, str] = {
    "isotropic": "ω ~ N(0, I) (Performer)",
    "oprf": "the best multiple of I, weighted back to softmax (FAVOR++)",
    "optimal": "the best Gaussian for the measured second moments, weighted back to softmax; always exists",
    "theorem32": "the paper's Σ* = (I + 2Λ)(I - 2Λ)⁻¹, weighted back to softmax; needs every eigenvalue of Λ below ½",
}


def optimal_eigenvalue(moment: Tensor) -> Tensor:
    """σ = (3 + 2λ + √((2λ + 1)² + 8λ))/4, the minimiser of `expected_log_moment` for an eigenvalue λ of E[zzᵀ].

    Setting the derivative of log σ - ½ log(2σ - 1) + λ/(2σ - 1) to zero gives 2σ² - (3 + 2λ)σ + 1 = 0, whose larger
    root this is. Finite for every λ ≥ 0 and 1 at λ = 0.
    """
    return (3 + 2 * moment + ((2 * moment + 1).square() + 8 * moment).sqrt()) / 4


def optimal_covariance(moment: Tensor) -> Tensor:
    """Σ* of the proposal that minimises the expected log second moment, for E[zzᵀ] = `moment` (…, d, d)."""
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * optimal_eigenvalue(values.clamp_min(0))[..., None, :]) @ vectors.mT


def oprf_covariance(moment: Tensor) -> Tensor:
    """The best multiple of the identity: `optimal_eigenvalue` of the mean eigenvalue (OPRF of FAVOR++)."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return optimal_eigenvalue(mean)[..., None, None] * eye


def theorem32_covariance(covariance: Tensor) -> Tensor:
    """Σ* = (I + 2Λ)(I - 2Λ)⁻¹ of Theorem 3.2, for q, k ~ N(0, Λ) independent.

    Raises:
        ConfigError: an eigenvalue of Λ is ½ or more, where the expected variance is infinite for every proposal of
            this form (names them).
    """
    values, vectors = torch.linalg.eigh(covariance)
    bad = values[values >= 0.5]
    if bad.numel():
        shown = ", ".join(f"{float(v):.3g}" for v in bad.flatten()[-5:])
        raise ConfigError(
            f"Theorem 3.2 needs every eigenvalue of Λ below 1/2; {bad.numel()} are not (largest: {shown}). "
            "proposal='optimal' exists for every Λ; a colder geometry or balancing makes Λ smaller."
        )
    return (vectors * ((1 + 2 * values) / (1 - 2 * values))[..., None, :]) @ vectors.mT


def log_weight(isotropic: Tensor, covariance: Tensor) -> Tensor:
    """log p_I(ω)/ψ(ω) of ω = Σ^½ ω₀ for rows ω₀ `isotropic` (…, m, d): (…, m).

    ½ log|Σ| - ½‖ω‖² + ½‖ω₀‖², since ωᵀΣ⁻¹ω = ‖ω₀‖².
    """
    drawn = isotropic @ symmetric_power(covariance, 0.5)
    difference = isotropic.square().sum(-1) - drawn.square().sum(-1)
    return 0.5 * (difference + torch.linalg.slogdet(covariance).logabsdet[..., None])


def expected_log_moment(covariance: Tensor, moment: Tensor) -> Tensor:
    """E log of one draw's relative second moment, nats, for a weighted proposal N(0, Σ) and E[zzᵀ] = `moment`.

    Infinite where 2I - Σ⁻¹ is not positive definite. Beyond about 10 nats no affordable number of features is
    accurate pointwise.
    """
    inverse = torch.linalg.inv(covariance)
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    tail = 2 * eye - inverse
    values = torch.linalg.eigvalsh(tail)
    form = 2 * torch.linalg.inv(tail) - eye
    trace = (form * moment).sum((-2, -1))
    logdet = torch.linalg.slogdet(covariance).logabsdet - values.clamp_min(1e-300).log().sum(-1)
    return torch.where((values > 0).all(-1), 0.5 * logdet + trace, torch.inf)


def expected_moment(covariance: Tensor, moment: Tensor) -> Tensor:
    """log E of one draw's relative second moment for Gaussian z ~ N(0, C), C = `moment`: infinite if it diverges.

    E exp(zᵀDz) = |I - 2DC|^-½ while D·C has eigenvalues below ½, D = 2(2I - Σ⁻¹)⁻¹ - I.
    """
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    tail = 2 * eye - torch.linalg.inv(covariance)
    positive = (torch.linalg.eigvalsh(tail) > 0).all(-1)
    form = 2 * torch.linalg.inv(tail) - eye
    root = symmetric_power(moment, 0.5)
    inner = torch.linalg.eigvalsh(eye - 2 * root @ form @ root)
    logdet = torch.linalg.slogdet(covariance).logabsdet - torch.linalg.slogdet(tail).logabsdet
    value = 0.5 * (logdet - inner.clamp_min(1e-300).log().sum(-1))
    return torch.where(positive & (inner > 0).all(-1), value, torch.inf)
