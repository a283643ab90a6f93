"""The projection Ω: rows N(0, I), orthogonal in blocks, reproducible from the seed alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from darkformer import ConfigError, DarkConfig, feature_map
from darkformer.config import DRAWS
from darkformer.features import draws as draws_module
from darkformer.features.draws import (
    DRAW_FUNCTIONS,
    draw_iid,
    draw_orthogonal,
    draw_projection,
    draw_simplex,
    draw_sobol,
)

HEADS, FEATURES, DIM = 3000, 6, 4


@pytest.fixture(scope="module", params=sorted(DRAWS))
def draws(request: pytest.FixtureRequest) -> Tensor:
    """(3000, 6, 4): independent draws of one and a half blocks."""
    return draw_projection(request.param, FEATURES, DIM, heads=range(HEADS), seed=7)


def within_standard_errors(samples: Tensor, expected: Tensor | float, limit: float = 4.0) -> bool:
    """Whether the mean over dimension 0, whose entries are independent, is the expected one."""
    error = samples.std(0) / len(samples) ** 0.5
    return bool(((samples.mean(0) - expected).abs() <= limit * error + 1e-12).all())


def test_every_row_is_standard_normal(draws: Tensor) -> None:
    """Mean, covariance, fourth moment, and the norms' mean and variance (χ² has d and 2d)."""
    assert within_standard_errors(draws, 0.0)
    outer = draws[..., :, None] * draws[..., None, :]
    assert within_standard_errors(outer, torch.eye(DIM, dtype=torch.float64))
    assert within_standard_errors(draws**4, 3.0)
    squared = draws.square().sum(-1)
    assert within_standard_errors(squared, float(DIM))
    assert within_standard_errors((squared - DIM).square(), 2.0 * DIM)


def test_without_sign_correction_the_directions_are_not_haar() -> None:
    """Negative control of the moments: LAPACK's QR alone has directions with a mean."""
    gaussian = torch.randn(HEADS, DIM, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert not within_standard_errors(torch.linalg.qr(gaussian)[0].mT, 0.0)


@pytest.mark.parametrize(("features", "dim"), [(8, 8), (20, 8), (5, 8), (1, 8), (3, 1), (16, 1)])
def test_orthogonal_in_blocks(features: int, dim: int) -> None:
    rows = draw_orthogonal(features, dim, torch.Generator().manual_seed(0))
    assert rows.shape == (features, dim) and rows.dtype == torch.float64
    gram = rows @ rows.T
    block = torch.arange(features) // dim
    same = block[:, None] == block[None, :]
    off_diagonal = ~torch.eye(features, dtype=torch.bool)
    assert gram[same & off_diagonal].abs().le(1e-12).all()
    if features > dim > 1:  # blocks are independent of each other
        assert gram[~same].abs().gt(1e-3).any()
    assert rows.norm(dim=1).unique().numel() == features


def test_iid_rows_are_not_orthogonal() -> None:
    rows = draw_iid(8, 8, torch.Generator().manual_seed(0))
    assert (rows @ rows.T).triu(1).abs().max() > 0.1


@pytest.mark.parametrize(("features", "dim"), [(8, 8), (20, 8), (5, 8), (2, 2), (3, 1)])
def test_simplex_angles_are_equal_in_blocks(features: int, dim: int) -> None:
    rows = draw_simplex(features, dim, torch.Generator().manual_seed(0))
    assert rows.shape == (features, dim) and rows.dtype == torch.float64
    units = rows / rows.norm(dim=1, keepdim=True)
    block = torch.arange(features) // dim
    inside = (block[:, None] == block[None, :]) & ~torch.eye(features, dtype=torch.bool)
    if dim > 1:
        torch.testing.assert_close((units @ units.T)[inside], torch.full((int(inside.sum()),), -1 / (dim - 1)).double())
    assert rows.norm(dim=1).unique().numel() == features


@pytest.mark.parametrize(("features", "dim"), [(1, 1), (128, 64), (37, 256)])
def test_sobol_is_finite_and_of_any_shape(features: int, dim: int) -> None:
    for seed in range(3):
        rows = draw_sobol(features, dim, torch.Generator().manual_seed(seed))
        assert rows.shape == (features, dim) and rows.dtype == torch.float64 and rows.isfinite().all()


@pytest.mark.parametrize("edge", [0, (1 << 30) - 1])
def test_sobol_at_the_edges_of_the_grid(edge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantile is never 0 or 1, although torch's own first point is rounded to float32, and 2^30 - 1 to 1."""

    class Edge(draws_module.SobolEngine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.shift.fill_(edge)
            self.quasi.fill_(edge)
            self._first_point = (self.quasi / 2**self.MAXBIT).reshape(1, -1)

    monkeypatch.setattr(draws_module, "SobolEngine", Edge)
    rows = draw_sobol(64, 3, torch.Generator().manual_seed(0))
    assert rows.isfinite().all() and rows.abs().max() < 6.3
    assert rows[0].abs().min() > 6
    edge = 357913941  # not a float32: the first point keeps its 30 bits
    found = draw_sobol(2, 3, torch.Generator().manual_seed(0))[0]
    expected = torch.special.ndtri(torch.full((3,), (edge + 0.5) / 2**30, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_sobol_fills_every_coordinate_evenly() -> None:
    """With m = 64 points, each of 64 equally likely cells of a coordinate gets about one: far from iid."""

    def variance_of_the_mean(draw: Callable[..., Tensor]) -> float:
        rows = torch.stack([draw(64, 8, torch.Generator().manual_seed(seed)) for seed in range(40)])
        return float(rows.mean(1).square().mean())

    assert variance_of_the_mean(draw_sobol) < 0.05 * variance_of_the_mean(draw_iid)


def test_registries_agree() -> None:
    assert set(DRAW_FUNCTIONS) == set(DRAWS)


@pytest.mark.parametrize("draw", sorted(DRAWS))
def test_reproducible_from_the_seed_alone(draw: str) -> None:
    config = DarkConfig(num_features=10, draw=draw, seed=3)
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    first = feature_map(config, **shape, layer=5).projection
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = feature_map(config, **shape, layer=5).projection
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())  # the global stream is left alone
    assert first.shape == (2, 10, 4) and first.dtype == torch.float32
    drawn = draw_projection(draw, 10, 4, heads=range(3), seed=3, layer=5)
    assert torch.equal(drawn[:2].float(), first)  # one head's draw does not depend on how many there are


@pytest.mark.parametrize("draw", sorted(DRAWS))
def test_heads_layers_and_seeds_differ(draw: str) -> None:
    drawn = [
        *draw_projection(draw, 8, 4, heads=range(4), seed=0, layer=0),
        *draw_projection(draw, 8, 4, heads=range(4), seed=0, layer=1),
        *draw_projection(draw, 8, 4, heads=range(4), seed=1, layer=0),
        *draw_projection(draw, 8, 4, heads=range(4), seed=2**40, layer=0),
    ]
    for i, x in enumerate(drawn):
        for y in drawn[:i]:
            assert (x - y).abs().min(dim=-1).values.max() > 1e-3


def test_unknown_draw() -> None:
    with pytest.raises(ConfigError, match="draw='halton' is unknown: choose one of orthogonal, iid, simplex, sobol"):
        draw_projection("halton", 4, 4, heads=range(1))
