"""One affine map per side that holds everything the log-features are made of, differentiable in all of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...features.maps import FeatureParameters

#: Tokens from which on a QR factorisation a kv head (0.1 ms at d = 64) costs less than the half product it saves.
MANY = 4096
#: Tokens from which on it pays to look whether draws are orthogonal (0.8 ms for 8 kv heads at d = 64).
SOME = 2048
#: Largest |cosine| between rows of Ω that count as orthogonal. Draws are made in float64 and kept in float32.
ORTHOGONAL = 1e-5


class Maps(NamedTuple):
    """The maps of `Inputs`, under the same names."""

    wq: Tensor
    offq: Tensor
    wk: Tensor
    offk: Tensor
    foldq: Tensor
    foldk: Tensor


def _turn(norm: Tensor | None, tokens: int) -> Tensor | None:
    """Qᵀ of N = QR where it pays: ‖R·x - Qᵀb‖ = ‖N·x - b‖, and the library multiplies by half of a triangular R only.

    Q is a constant: ‖y‖ does not change as y turns, so the gradient that reaches N through R = QᵀN is N's own, if all
    of R has one, its zeros too.
    """
    if norm is None or tokens < MANY or norm.shape[1] > norm.shape[2]:
        return None
    return torch.linalg.qr(norm.detach()).Q.mT


def folds(p: FeatureParameters, head_dim: int, tokens: int) -> bool:
    """Whether the first d rows of Ω, d its columns, are orthogonal: over their lengths, ΩN is a turned N there.

    Rows that are parameters (`lfk`) do not stay orthogonal, so they have gradients of their own. The numbers are looked
    at each time, because a buffer may be changed; tracing by `torch.compile` cannot look.
    """
    omega = p.projection
    if omega is None or tokens < SOME or torch.compiler.is_compiling():
        return False
    if omega.requires_grad or omega.shape[1] < head_dim or omega.shape[2] != head_dim:
        return False
    rows = torch.nn.functional.normalize(omega[:, :head_dim], dim=2)
    return bool((rows @ rows.mT - torch.eye(head_dim)).abs().max() < ORTHOGONAL)


def _fold(omega: Tensor, shift: Tensor, other: Tensor | None) -> Tensor:
    """(G, 3, d): inverse lengths of the first rows of Ω; N's offset, turned like its rows; what joins all log-features.

    The turn is a constant, as in `_turn`: the gradient through P is that of N.
    """
    inverse = 1 / omega[:, : shift.shape[1]].norm(dim=2)
    turned = inverse * (omega[:, : shift.shape[1]] @ shift[:, :, None]).squeeze(-1)
    return torch.stack([inverse, turned, torch.zeros_like(shift) if other is None else other], dim=1)


def _side(
    p: FeatureParameters, linear: Tensor | None, turn: Tensor | None, center: Tensor | None, other: Tensor | None,
    head_dim: int, folded: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """[P; N] (G, m + d, d), [a; b] (G, m + d) with ℓ = P·x̃ - a - ½‖N·x̃ - b‖² for scaled x̃, and the fold.

    ωᵀN(x - c) + otherᵀ(x - c) - … : the term linear in x joins every row of P, or stands in the fold.
    """
    assert p.projection is not None
    norm = torch.eye(head_dim).expand(p.projection.shape[0], -1, -1) if linear is None else linear
    pure = p.projection if linear is None else p.projection @ linear
    rows = pure if other is None else pure + other[:, None, :]
    offset = rows.new_full(rows.shape[:2], 0.5 * math.log(p.config.num_features))
    if p.log_weight is not None:
        offset = offset - 0.5 * p.log_weight
    shift = norm.new_zeros(norm.shape[:2])
    if center is not None:
        offset = offset + (rows @ center[:, :, None]).squeeze(-1)
        shift = (norm @ center[:, :, None]).squeeze(-1)
    fold = _fold(p.projection, shift, other) if folded else norm[:, :0]
    if turn is not None:
        norm, shift = turn @ norm, (turn @ shift[:, :, None]).squeeze(-1)
        norm = norm + (norm.triu() - norm).detach()
    return torch.cat([pure if folded else rows, norm], dim=1), torch.cat([offset, shift], dim=1), fold


def sides(p: FeatureParameters, groups: int, head_dim: int, scaling: float, *, tokens: int = 1) -> Maps:
    """The maps for raw (unscaled) queries and keys.

    The formulas are those of `features.maps`: the query's side has cᵀ(q - b) and the far bias, the key's side bᵀk.

    Args:
        tokens: that the maps are made for; with few of them nothing is folded and nothing made triangular.
    """
    if not p.config.feature_count:
        nothing = torch.zeros(groups, 0, head_dim)
        return Maps(nothing, nothing[..., 0], nothing, nothing[..., 0], nothing, nothing)
    b, c = p.query_center, p.key_center
    both = b is not None and c is not None
    folded = folds(p, head_dim, tokens)
    turn_q = None if folded else _turn(p.query_map, tokens)
    root = scaling**0.5

    def side(
        linear: Tensor | None, turn: Tensor | None, center: Tensor | None, other: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        w, offset, fold = _side(p, linear, turn, center, other, head_dim, folded)
        if folded:  # the part that is linear in x, like the maps
            fold = torch.tensor([1.0, 1.0, root])[:, None] * fold
        return root * w, offset, fold

    wq, offq, foldq = side(p.query_map, turn_q, b, c if both else None)
    if p.key_map is p.query_map and b is None and c is None:  # the paper's form: made once
        wk, offk, foldk = wq, offq, foldq
    else:
        turn_k = turn_q if p.key_map is p.query_map or folded else _turn(p.key_map, tokens)
        wk, offk, foldk = side(p.key_map, turn_k, c, b)
    m = p.projection.shape[1] if p.projection is not None else 0

    def features(x: Tensor) -> Tensor:  # (G,) for every feature, nothing for the rows of N
        return torch.nn.functional.pad(x[:, None].expand(-1, m), (0, head_dim_rows))

    head_dim_rows = wq.shape[1] - m
    if p.far_bias is not None:
        offq = offq - features(p.far_bias)
    if b is not None and c is not None:  # bᵀk, not bᵀ(k - c)
        offk = offk - features((b * c).sum(-1))
    return Maps(wq, offq, wk, offk, foldq, foldk)
