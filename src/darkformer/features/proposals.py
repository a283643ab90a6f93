"""Gaussian proposals N(0, Σ) for the features' draws, and the second moments that tell them apart.

For z = q + k and weights p_I/ψ, one draw's relative second moment is, in closed form,
E_ψ[(w φ(q)φ(k))²] / exp(2qᵀk) = |Σ|^½ |2I - Σ⁻¹|^-½ exp(zᵀ(2(2I - Σ⁻¹)⁻¹ - I)z); for Σ = I it is exp(‖z‖²).
An estimator of another kernel exp(qᵀSk) is this one in the coordinates S^½q, S^½k: draws from N(0, Σ) without weights
are S = Σ and a proposal of I there; isotropic draws with the weight p_S/p_I are a proposal of S⁻¹ there.
Everything here works on symmetric (…, d, d) matrices through their eigenvalues; give float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import PROPOSALS
from ..errors import ConfigError
from .same import DENSE_TYPES, same_numbers
from .tracing import traced, transformed
from .transforms import symmetric_power


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
    """The best multiple of the identity: `optimal_eigenvalue` of the mean eigenvalue (OPRF of FAVOR++).

    With λ = ‖z‖²/d it is 1 - 4A*, A* the closed form of Likhosherstov et al. 2022 ("Chefs' Random Tables").
    """
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return optimal_eigenvalue(mean)[..., None, None] * eye


def inadmissible(covariance: Tensor) -> list[list[float]]:
    """Eigenvalues of Λ (…, d, d) at or above ½, one list a matrix (flattened): where Theorem 3.2 has no proposal."""
    values = torch.linalg.eigvalsh(covariance).reshape(-1, covariance.shape[-1])
    return [[float(v) for v in row[row >= 0.5]] for row in values]


def theorem32_covariance(covariance: Tensor) -> Tensor:
    """Σ* = (I + 2Λ)(I - 2Λ)⁻¹ of Theorem 3.2, for q, k ~ N(0, Λ) independent.

    Raises:
        ConfigError: an eigenvalue of Λ is ½ or more, where the expected variance is infinite for every proposal
            (names them, and the matrix they belong to when there are several).
    """
    values, vectors = torch.linalg.eigh(covariance)
    bad = inadmissible(covariance)
    if any(bad):
        several = covariance.dim() > 2
        shown = "; ".join(
            (f"head {g}: " if several else "") + ", ".join(f"{v:.3g}" for v in row[::-1])
            for g, row in enumerate(bad)
            if row
        )
        raise ConfigError(
            f"Theorem 3.2 needs every eigenvalue of Λ below 1/2; these are not: {shown}. "
            "proposal='optimal' exists for every Λ; a colder geometry or balancing makes Λ smaller."
        )
    return (vectors * ((1 + 2 * values) / (1 - 2 * values))[..., None, :]) @ vectors.mT


def shared_covariance(query: Tensor, key: Tensor) -> Tensor:
    """The Λ whose Theorem 3.2 proposal is the optimum of q ~ N(0, Λ_q), k ~ N(0, Λ_k): Λ itself if they agree.

    ψ* ∝ p·√(E_q φ²·E_k φ²) needs only the mean of Λ_q(I + 2Λ_q)⁻¹ and Λ_k(I + 2Λ_k)⁻¹; Λ is the matrix with that
    value, which exists always. Balanced queries and keys have Λ_q = Λ_k.
    """
    values, vectors = zip(*(torch.linalg.eigh(x) for x in (query, key)), strict=True)
    halves = [(u * (v / (1 + 2 * v))[..., None, :]) @ u.mT for v, u in zip(values, vectors, strict=True)]
    mean, basis = torch.linalg.eigh(0.5 * (halves[0] + halves[1]))
    return (basis * (mean / (1 - 2 * mean))[..., None, :]) @ basis.mT


class PairMoments(NamedTuple):
    """Second moments about zero, in the coordinates of the features; each (…, d, d)."""

    query: Tensor  # E[qqᵀ]
    key: Tensor  # E[kkᵀ]
    total: Tensor  # E[zzᵀ] of z = q + k, q and k independent

    def scaled(self, scale: Tensor) -> PairMoments:
        """Of scale·q and scale·k; scale (…)."""
        return PairMoments(*(x * scale.to(x).square()[..., None, None] for x in self))


def pair_moments(query: Tensor, key: Tensor, query_mean: Tensor, key_mean: Tensor) -> PairMoments:
    """`PairMoments` of E[qqᵀ], E[kkᵀ] (…, d, d), and the means (…, d): E[zzᵀ] has their cross terms."""
    cross = query_mean[..., :, None] * key_mean[..., None, :]
    return PairMoments(query, key, query + key + cross + cross.mT)


def proposal_covariance(proposal: str, moments: PairMoments) -> Tensor:
    """Σ* (…, d, d) of a proposal by its name in `PROPOSALS`.

    Raises:
        ConfigError: unknown name, or `theorem32` where it has no proposal (names the eigenvalues).
    """
    if proposal not in PROPOSALS:
        raise ConfigError(f"proposal={proposal!r} is unknown: choose one of {', '.join(PROPOSALS)}.")
    if proposal == "optimal":
        return optimal_covariance(moments.total)
    if proposal == "oprf":
        return oprf_covariance(moments.total)
    if proposal == "theorem32":
        return theorem32_covariance(shared_covariance(moments.query, moments.key))
    return torch.eye(moments.query.shape[-1]).to(moments.query).expand_as(moments.query)


#: Roots as they were, and the logarithms of their determinants.
_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _eliminate(matrix: Tensor) -> Tensor:
    """log |X| of symmetric positive definite X (…, d, d), by Gaussian elimination in float64: (…)."""
    rest, pivots = matrix.double(), []
    for _ in range(matrix.shape[-1]):
        pivots.append(rest[..., 0, 0])
        rest = rest[..., 1:, 1:] - rest[..., 1:, :1] * (rest[..., :1, 1:] / pivots[-1][..., None, None])
    return torch.stack(pivots, -1).abs().log().sum(-1)


def log_determinant(root: Tensor) -> Tensor:
    """log |Σ^½| of the symmetric positive definite `root` (…, d, d): (…), float64. Kept until a number changes.

    Not by LAPACK: forward passes need it, in which MKL's factorisation can hang after the number of threads changed.
    """
    readable = type(root) in DENSE_TYPES and not (traced(root) or transformed() or torch.compiler.is_compiling())
    if not readable or root.requires_grad:
        return _eliminate(root)
    before, answer = _KNOWN.get(root, (root.new_empty(0), root))
    if not same_numbers(before, root):
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be used with gradients
            answer = _eliminate(root.clone())
            _KNOWN[root] = root.clone(), answer
    return answer


def log_weight(isotropic: Tensor, root: Tensor, log_det: Tensor) -> Tensor:
    """log p_I(ω)/ψ(ω) of ω = Σ^½ω₀ for rows ω₀ `isotropic` (…, m, d): (…, m).

    ½ log|Σ| - ½‖ω‖² + ½‖ω₀‖², since ωᵀΣ⁻¹ω = ‖ω₀‖².

    Args:
        root: the symmetric Σ^½ (…, d, d). log_det: its `log_determinant` (…).
    """
    difference = isotropic.square().sum(-1) - (isotropic @ root).square().sum(-1)
    return 0.5 * difference + log_det.to(isotropic.dtype)[..., None]


def _tail(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """2I - Σ⁻¹, and whether it is positive definite: else every second moment is infinite."""
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    tail = 2 * eye - torch.linalg.inv(covariance)
    return tail, (torch.linalg.eigvalsh(tail) > 0).all(-1)


def _form(tail: Tensor) -> Tensor:
    """2(2I - Σ⁻¹)⁻¹ - I: how a relative second moment's logarithm grows with z."""
    return 2 * torch.linalg.inv(tail) - torch.eye(tail.shape[-1], dtype=tail.dtype, device=tail.device)


def log_moment(covariance: Tensor, z: Tensor) -> Tensor:
    """log of one draw's relative second moment at z = q + k (…, N, d), weighted proposal N(0, Σ): (…, N), nats.

    The relative variance of the mean of m independent draws is (exp(this) - 1)/m.
    """
    tail, finite = _tail(covariance)
    logdet = torch.linalg.slogdet(covariance).logabsdet - torch.linalg.slogdet(tail).logabsdet
    value = 0.5 * logdet[..., None] + ((z @ _form(tail)) * z).sum(-1)
    return torch.where(finite[..., None], value, torch.inf)


def expected_log_moment(covariance: Tensor, moment: Tensor) -> Tensor:
    """E log of one draw's relative second moment, nats, for a weighted proposal N(0, Σ) and E[zzᵀ] = `moment`.

    Holds for every distribution of z. Infinite where 2I - Σ⁻¹ is not positive definite. Beyond about 10 nats no
    affordable number of features is accurate pointwise.
    """
    tail, finite = _tail(covariance)
    logdet = torch.linalg.slogdet(covariance).logabsdet - torch.linalg.slogdet(tail).logabsdet
    return torch.where(finite, 0.5 * logdet + (_form(tail) * moment).sum((-2, -1)), torch.inf)


def expected_moment(covariance: Tensor, moment: Tensor) -> Tensor:
    """log E of one draw's relative second moment for Gaussian z ~ N(0, C), C = `moment`: infinite if it diverges.

    E exp(zᵀDz) = |I - 2DC|^-½ while D·C has eigenvalues below ½, D = 2(2I - Σ⁻¹)⁻¹ - I.
    """
    tail, finite = _tail(covariance)
    root = symmetric_power(moment, 0.5)
    inner = torch.linalg.eigvalsh(torch.eye(moment.shape[-1]).to(moment) - 2 * root @ _form(tail) @ root)
    logdet = torch.linalg.slogdet(covariance).logabsdet - torch.linalg.slogdet(tail).logabsdet
    value = 0.5 * (logdet - inner.clamp_min(1e-300).log().sum(-1))
    return torch.where(finite & (inner > 0).all(-1), value, torch.inf)


def expected_square(covariance: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """log E[(w φ(q)φ(k))²] for a weighted proposal N(0, Σ), q ~ N(0, Λ_q), k ~ N(0, Λ_k): what Theorem 3.2 minimises.

    |Σ|^½ |I + 2Λ_q|^-½ |I + 2Λ_k|^-½ |2I - Σ⁻¹ - 4Λ_q(I + 2Λ_q)⁻¹ - 4Λ_k(I + 2Λ_k)⁻¹|^-½, infinite where the last
    matrix is not positive definite: for Σ = I already at an eigenvalue of 1/6. Minus E[exp(2qᵀk)] it is the variance.
    """
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    exponent = 2 * eye - torch.linalg.inv(covariance)
    logdet = torch.linalg.slogdet(covariance).logabsdet
    for second in (query, key):
        wide = torch.linalg.inv(eye + 2 * second)
        exponent = exponent - 2 * (eye - wide)  # 4Λ(I + 2Λ)⁻¹
        logdet = logdet + torch.linalg.slogdet(wide).logabsdet
    values = torch.linalg.eigvalsh(0.5 * (exponent + exponent.mT))
    value = 0.5 * (logdet - values.clamp_min(1e-300).log().sum(-1))
    return torch.where((values > 0).all(-1), value, torch.inf)
