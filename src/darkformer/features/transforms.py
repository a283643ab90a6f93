"""Changes of variables that leave softmax attention exactly as it is, in closed form from second moments.

For any vectors b, c and invertible A, with q' = A(q-b) and k' = A⁻ᵀ(k-c):
q'ᵀk' = qᵀk - bᵀk - cᵀq + bᵀc. The features carry the three remaining terms as log-weights, so nothing is lost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, InputError


def symmetric_power(matrix: Tensor, power: float, floor: float = 0.0) -> Tensor:
    """matrix^power of symmetric positive definite matrices (…, d, d), eigenvalues raised to `floor` at least."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(floor).pow(power)[..., None, :]) @ vectors.mT


def regularise(covariance: Tensor, relative: float = 1e-4) -> Tensor:
    """Adds `relative` × the mean variance to the diagonal: a stated rule for singular covariances. (…, d, d)."""
    dim = covariance.shape[-1]
    mean_variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool((mean_variance > 0).all()):
        raise InputError("a head's queries or keys have no variance at all: its covariance cannot be balanced.")
    return covariance + relative * mean_variance[..., None, None] * torch.eye(dim).to(covariance)


class Balance(NamedTuple):
    """The pair of maps: `query` = A, `key` = A⁻ᵀ, both (…, d, d)."""

    query: Tensor
    key: Tensor


def balance(query_covariance: Tensor, key_covariance: Tensor) -> Balance:
    """A with A·Cov(q)·Aᵀ = A⁻ᵀ·Cov(k)·A⁻¹, the symmetric positive one.

    X = AᵀA solves X·Cov(q)·X = Cov(k), so X is the matrix geometric mean of Cov(q)⁻¹ and Cov(k), and A = X^½.
    Computed in float64: the eigenvalues of the product under the root spread over the square of the inputs' range.

    Args:
        query_covariance: (…, d, d) symmetric positive semi-definite.
        key_covariance: (…, d, d) likewise.

    Returns:
        Balance in the inputs' dtype.

    Raises:
        InputError: a head without any variance.
    """
    dtype = query_covariance.dtype
    query_covariance, key_covariance = regularise(query_covariance.double()), regularise(key_covariance.double())
    root = symmetric_power(query_covariance, 0.5)
    inverse_root = symmetric_power(query_covariance, -0.5)
    squared = inverse_root @ symmetric_power(root @ key_covariance @ root, 0.5) @ inverse_root
    squared = 0.5 * (squared + squared.mT)
    return Balance(symmetric_power(squared, 0.5).to(dtype), symmetric_power(squared, -0.5).to(dtype))


def whitening(covariance: Tensor, temperature: str) -> Tensor:
    """M that makes M·x isotropic for x with this covariance Λ (Proposition C.1), at a temperature named explicitly.

    M = c·Λ^-½ is one geometry for queries and keys, so the kernel becomes exp(c²·qᵀΛ⁻¹k): not softmax's, but one of
    temperature c^-2. `literal`: c = 1, M·x has the identity for its covariance, and logits a standard
    deviation of √d. `preserve`: c⁴ = tr(Λ²)/d keeps E[(qᵀk)²] of independent q, k with covariance Λ.

    Args:
        covariance: Λ (…, d, d), regularised by `regularise`. temperature: "literal" or "preserve".

    Returns:
        (…, d, d), symmetric, in the input's dtype.

    Raises:
        ConfigError: another temperature. InputError: a head without any variance.
    """
    if temperature not in ("literal", "preserve"):
        raise ConfigError(f"temperature={temperature!r} is unknown: choose literal or preserve.")
    regular = regularise(covariance.double())
    root = symmetric_power(regular, -0.5)
    if temperature == "preserve":
        mean_square = regular.square().sum((-2, -1)) / regular.shape[-1]
        root = root * mean_square.pow(0.25)[..., None, None]
    return root.to(covariance.dtype)
