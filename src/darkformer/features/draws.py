"""Draws of the random projection Ω, from an explicit generator. Always on the CPU in float64, then cast."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ..config import DRAWS
from ..errors import ConfigError


def head_generator(seed: int, layer: int, head: int, step: int = 0) -> torch.Generator:
    """A CPU generator for one key/value head; streams of different (seed, layer, head, step) are independent.

    `step` is 0 for the draw at construction, and the optimizer step of a redraw.
    """
    key = (step,) if step else ()
    words = np.random.SeedSequence([seed, layer, head], spawn_key=key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def draw_iid(num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """Independent rows ω ~ N(0, I). Returns (m, dim) float64."""
    return torch.randn(num_features, dim, generator=generator, dtype=torch.float64)


def _haar(dim: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix (dim, dim): QR with its signs corrected by those of R's diagonal."""
    directions, upper = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return directions * upper.diagonal().sign()


def _rotated_blocks(figure: Tensor, num_features: int, generator: torch.Generator) -> Tensor:
    """Unit rows of `figure` (d, d), rotated anew for every block of d features, with the norms of N(0, I) vectors."""
    dim, blocks = figure.shape[1], []
    for start in range(0, num_features, dim):
        directions = figure @ _haar(dim, generator).T
        norms = torch.randn(dim, dim, generator=generator, dtype=torch.float64).norm(dim=1)
        blocks.append((norms[:, None] * directions)[: num_features - start])
    return torch.cat(blocks)


def draw_orthogonal(num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows in blocks of `dim` orthogonal directions, each row with the norm of an N(0, I) vector.

    Every row is N(0, I) by itself, so the estimator stays unbiased (Performer, Choromanski et al. 2021, section 2.4).

    Returns:
        (m, dim) float64.
    """
    return _rotated_blocks(torch.eye(dim, dtype=torch.float64), num_features, generator)


def draw_simplex(num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows in blocks of `dim` directions at pairwise cosine -1/(dim-1), each row with the norm of an N(0, I) vector.

    SimRF (Reid et al. 2023): any two rows point further apart than orthogonal ones, which makes the products' errors
    cancel a little more. Every row is N(0, I) by itself. The gain over `orthogonal` is of the order 1/dim, and the
    optimality holds for positive features and iid norms. A regular simplex in one dimension is one random sign.

    Returns:
        (m, dim) float64.
    """
    corners = torch.eye(dim, dtype=torch.float64)
    if dim > 1:
        corners = corners - 1 / dim
    return _rotated_blocks(corners / corners.norm(dim=1, keepdim=True), num_features, generator)


def draw_sobol(num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """Scrambled Sobol' points through the normal quantile: one low-discrepancy set of m points.

    The digital shift makes every row N(0, I) by itself, on a grid of 2^30 quantiles a coordinate (tails end at 6.2).
    The points even out every coordinate and, for m well above dim, low-dimensional projections; a power of two for m
    is best, and for m < dim there is little to even out. Rows of a set are strongly dependent: estimate variances over
    independent sets (heads, seeds), never over rows.

    Returns:
        (m, dim) float64.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator))
    engine = SobolEngine(dim, scramble=True, seed=seed)
    points = engine.draw(num_features, dtype=torch.float64)
    grid = 2.0**-engine.MAXBIT
    points[0] = engine.shift.double() * grid  # torch rounds its first point to float32, where it can become 1
    return torch.special.ndtri((points + 0.5 * grid).clamp(0.5 * grid, 1 - 0.5 * grid))


DRAW_FUNCTIONS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "iid": draw_iid,
    "orthogonal": draw_orthogonal,
    "simplex": draw_simplex,
    "sobol": draw_sobol,
}


def draw_projection(
    draw: str, num_features: int, dim: int, *, heads: Iterable[int], seed: int = 0, layer: int = 0, step: int = 0
) -> Tensor:
    """Ω for the key/value heads of a layer that `heads` numbers, each reproducible from (seed, layer, head, step).

    Returns:
        (G, m, dim) float64 on the CPU.

    Raises:
        ConfigError: unknown `draw`.
    """
    if draw not in DRAW_FUNCTIONS:
        raise ConfigError(f"draw={draw!r} is unknown: choose one of {', '.join(DRAWS)}.")
    function = DRAW_FUNCTIONS[draw]
    return torch.stack([function(num_features, dim, head_generator(seed, layer, g, step)) for g in heads])


def hash_uniform(counter: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) from int64 counters, the same on every device (the mixer of SplitMix64)."""
    h = counter * -7046029254386353131
    h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    h = (h ^ ((h >> 31) & 0x1FFFFFFFF)) & ((1 << 52) - 1)
    return (h.double() + 0.5) / (1 << 52)
