"""One affine map per side that holds everything the log-features are made of, differentiable in all of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...features.maps import FeatureParameters

#: Tokens from which on a QR factorisation a kv head (0.1 ms at d = 64) costs less than the half product it saves.
MANY = 4096


def _turn(norm: Tensor | None, tokens: int) -> Tensor | None:
    """Qᵀ of N = QR where it pays: ‖R·x - Qᵀb‖ = ‖N·x - b‖, and the library multiplies by half of a triangular R only.

    Q is a constant: ‖y‖ does not change as y turns, so the gradient that reaches N through R = QᵀN is N's own, if all
    of R has one, its zeros too.
    """
    if norm is None or tokens < MANY or norm.shape[1] > norm.shape[2]:
        return None
    return torch.linalg.qr(norm.detach()).Q.mT


def _side(
    p: FeatureParameters, linear: Tensor | None, turn: Tensor | None, center: Tensor | None, other: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[P; N] (G, m + d, d) and [a; b] (G, m + d) with ℓ = P·x̃ - a - ½‖N·x̃ - b‖² for scaled x̃.

    ωᵀN(x - c) + otherᵀ(x - c) - … : the term linear in x joins every row of P.
    """
    assert p.projection is not None
    norm = torch.eye(head_dim).expand(p.projection.shape[0], -1, -1) if linear is None else linear
    rows = p.projection if linear is None else p.projection @ linear
    if other is not None:
        rows = rows + other[:, None, :]
    offset = rows.new_full(rows.shape[:2], 0.5 * math.log(p.config.num_features))
    if p.log_weight is not None:
        offset = offset - 0.5 * p.log_weight
    shift = norm.new_zeros(norm.shape[:2])
    if center is not None:
        offset = offset + (rows @ center[:, :, None]).squeeze(-1)
        shift = (norm @ center[:, :, None]).squeeze(-1)
    if turn is not None:
        norm, shift = turn @ norm, (turn @ shift[:, :, None]).squeeze(-1)
        norm = norm + (norm.triu() - norm).detach()
    return torch.cat([rows, norm], dim=1), torch.cat([offset, shift], dim=1)


def sides(
    p: FeatureParameters, groups: int, head_dim: int, scaling: float, *, tokens: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`wq`, `offq`, `wk`, `offk` of `Inputs` for raw (unscaled) queries and keys.

    The formulas are those of `features.maps`: the query's side has cᵀ(q - b) and the far bias, the key's side bᵀk.

    Args:
        tokens: that the maps are made for; from `MANY` on the map of the norm is made triangular.
    """
    if not p.config.feature_count:
        nothing = torch.zeros(groups, 0, head_dim)
        return nothing, nothing[..., 0], nothing, nothing[..., 0]
    b, c = p.query_center, p.key_center
    both = b is not None and c is not None
    turn_q = _turn(p.query_map, tokens)
    turn_k = turn_q if p.key_map is p.query_map else _turn(p.key_map, tokens)
    wq, offq = _side(p, p.query_map, turn_q, b, c if both else None, head_dim)
    wk, offk = _side(p, p.key_map, turn_k, c, b, head_dim)
    m = p.projection.shape[1] if p.projection is not None else 0

    def features(x: Tensor) -> Tensor:  # (G,) for every feature, nothing for the rows of N
        return torch.nn.functional.pad(x[:, None].expand(-1, m), (0, head_dim_rows))

    head_dim_rows = wq.shape[1] - m
    if p.far_bias is not None:
        offq = offq - features(p.far_bias)
    if b is not None and c is not None:  # bᵀk, not bᵀ(k - c)
        offk = offk - features((b * c).sum(-1))
    root = scaling**0.5
    return root * wq, offq, root * wk, offk
