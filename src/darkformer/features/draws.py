"""Draws of the random projection Ω, from an explicit generator. Always on the CPU in float64, then cast."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..config import DRAWS, ConfigError


def head_generator(seed: int, layer: int, head: int) -> torch.Generator:
    """A CPU generator for one key/value head; streams of different (seed, layer, head) are independent."""
    words = np.random.SeedSequence([seed, layer, head]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def draw_iid(num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """Independent rows ω ~ N(0, I). Returns (m, dim) float64."""
    return torch.randn(num_features, dim, generator=generator, dtype=torch.float64)


def draw_orthogonal(num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows in blocks of `dim` orthogonal directions, each row with the norm of an N(0, I) vector.

    Every row is N(0, I) by itself, so the estimator stays unbiased (Performer, Choromanski et al. 2021, section 2.4).
    The QR factor's signs are corrected by those of R's diagonal, else the directions are not Haar-distributed.

    Returns:
        (m, dim) float64.
    """
    blocks = []
    for start in range(0, num_features, dim):
        gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        directions, upper = torch.linalg.qr(gaussian)
        directions = (directions * upper.diagonal().sign()).T
        norms = torch.randn(dim, dim, generator=generator, dtype=torch.float64).norm(dim=1)
        blocks.append((norms[:, None] * directions)[: num_features - start])
    return torch.cat(blocks)


DRAW_FUNCTIONS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "iid": draw_iid,
    "orthogonal": draw_orthogonal,
}


def draw_projection(
    draw: str, num_features: int, dim: int, *, num_kv_heads: int, seed: int = 0, layer: int = 0
) -> Tensor:
    """Ω for every key/value head of a layer, reproducible from (seed, layer) alone.

    Returns:
        (G, m, dim) float64 on the CPU.

    Raises:
        ConfigError: unknown `draw`.
    """
    if draw not in DRAW_FUNCTIONS:
        raise ConfigError(f"draw={draw!r} is unknown: choose one of {', '.join(DRAWS)}.")
    function = DRAW_FUNCTIONS[draw]
    return torch.stack([function(num_features, dim, head_generator(seed, layer, g)) for g in range(num_kv_heads)])
