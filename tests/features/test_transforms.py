"""Centring and balancing: the pair A, A⁻ᵀ equalises the covariances and leaves softmax attention as it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import relative_error
from torch import Tensor

from darkformer import InputError
from darkformer.features.transforms import balance, regularise, symmetric_power


def covariance(dim: int, rank: int, scale: float, seed: int, heads: int = 3) -> Tensor:
    """(heads, d, d), float64, of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    root = scale * torch.randn(heads, dim, rank, generator=generator, dtype=torch.float64)
    return root @ root.mT / rank


@given(
    dim=st.integers(1, 24),
    query_rank=st.integers(1, 40),
    key_rank=st.integers(1, 40),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_balanced_covariances_are_equal(dim: int, query_rank: int, key_rank: int, scale: float, seed: int) -> None:
    """A·Cov(q)·Aᵀ = A⁻ᵀ·Cov(k)·A⁻¹ to 1e-8, for the covariances as regularised: singular ones are no special case."""
    query, key = covariance(dim, query_rank, scale, seed), covariance(dim, key_rank, 1.0, seed + 100)
    pair = balance(query, key)
    assert pair.query.isfinite().all() and pair.key.isfinite().all()
    eye = torch.eye(dim, dtype=torch.float64).expand(3, -1, -1)
    assert relative_error(pair.query.mT @ pair.key, eye) <= 1e-8
    balanced_query = pair.query @ regularise(query) @ pair.query.mT
    balanced_key = pair.key @ regularise(key) @ pair.key.mT
    assert relative_error(balanced_query, balanced_key) <= 1e-8
    assert relative_error(pair.query, pair.query.mT) <= 1e-8  # the symmetric, positive one
    assert torch.linalg.eigvalsh(pair.query).min() > 0


def test_full_rank_covariances_are_hardly_regularised() -> None:
    query, key = covariance(8, 400, 2.0, 1), covariance(8, 400, 0.5, 2)
    pair = balance(query, key)
    assert relative_error(pair.query @ query @ pair.query.mT, pair.key @ key @ pair.key.mT) <= 1e-3


def test_balancing_shrinks_the_norms() -> None:
    """Its purpose: E‖Aq‖² + E‖A⁻ᵀk‖² is the smallest of all A; the identity and other pairs have more."""
    query, key = covariance(8, 12, 3.0, 1, heads=1)[0], covariance(8, 12, 0.4, 2, heads=1)[0]

    def size(a: Tensor) -> float:
        inverse = a.inverse().T
        return float((a @ regularise(query) @ a.T).trace() + (inverse @ regularise(key) @ inverse.T).trace())

    best = balance(query, key).query
    assert size(best) < 0.7 * size(torch.eye(8, dtype=torch.float64))
    for _ in range(20):
        assert size(best) < size(best @ torch.linalg.matrix_exp(0.05 * torch.randn(8, 8, dtype=torch.float64)))


def test_equal_covariances_need_no_balance() -> None:
    same = covariance(6, 20, 1.3, 4)
    pair = balance(same, same)
    assert relative_error(pair.query, torch.eye(6, dtype=torch.float64).expand(3, -1, -1)) <= 1e-8


def test_float32() -> None:
    query, key = covariance(16, 2, 5.0, 1).float(), covariance(16, 3, 0.1, 2).float()
    pair = balance(query, key)
    assert pair.query.dtype == torch.float32
    eye = torch.eye(16).expand(3, -1, -1)
    assert relative_error(pair.query.mT @ pair.key, eye) <= 1e-2  # condition number 1e4


@pytest.mark.parametrize("which", ["query", "key"])
def test_no_variance(which: str) -> None:
    good, bad = covariance(4, 9, 1.0, 1), covariance(4, 9, 1.0, 2)
    bad[1] = 0
    with pytest.raises(InputError, match="no variance at all"):
        balance(*((bad, good) if which == "query" else (good, bad)))


def test_regularise() -> None:
    singular = torch.diag(torch.tensor([2.0, 0.0]).double())
    torch.testing.assert_close(regularise(singular, 0.01), torch.diag(torch.tensor([2.01, 0.01]).double()))


@pytest.mark.parametrize("power", [0.5, -0.5, -1.0, 2.0])
def test_symmetric_power(power: float) -> None:
    matrix = covariance(5, 20, 1.0, 3)
    found = symmetric_power(matrix, power)
    if power == 2.0:
        assert relative_error(found, matrix @ matrix) <= 1e-10
    elif power == -1.0:
        assert relative_error(found, matrix.inverse()) <= 1e-10
    else:
        expected = matrix if power > 0 else matrix.inverse()
        assert relative_error(found @ found, expected) <= 1e-10


def test_symmetric_power_raises_small_eigenvalues_to_the_floor() -> None:
    values = torch.diag(torch.tensor([4.0, 1e-12]).double())
    torch.testing.assert_close(symmetric_power(values, -0.5, floor=0.25), torch.diag(torch.tensor([0.5, 2.0]).double()))


def test_exact_attention_does_not_change() -> None:
    """q'ᵀk' - (qᵀk - bᵀk) has no k in it, so softmax with the log-weight bᵀk is the same softmax."""
    query, key = torch.randn(20, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    b, c = torch.randn(2, 6, dtype=torch.float64)
    pair = balance(covariance(6, 9, 2.0, 1, heads=1)[0], covariance(6, 9, 0.3, 2, heads=1)[0])
    transformed = ((query - b) @ pair.query.T) @ ((key - c) @ pair.key.T).T
    logits = query @ key.T
    rest = transformed - (logits - key @ b)
    assert (rest - rest[:, :1]).abs().max() <= 1e-10
    assert relative_error(rest[:, 0], b @ c - query @ c) <= 1e-10
    assert relative_error((transformed + key @ b).softmax(-1), logits.softmax(-1)) <= 1e-10
    assert relative_error(transformed.softmax(-1), logits.softmax(-1)) > 0.1  # without the log-weight it does
