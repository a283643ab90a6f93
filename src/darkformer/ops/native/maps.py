"""One affine map per side that holds everything the log-features are made of, differentiable in all of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...features.log_features import FeatureParameters
from ...features.same import PLAIN, same_numbers
from ...features.tracing import traced

#: Tokens from which on a QR factorisation a kv head (0.1 ms at d = 64) costs less than the half product it saves.
MANY = 4096
#: Tokens from which on it pays to look whether draws are orthogonal that are made anew in each call: 0.8 ms for 8 kv
#: heads at d = 64.
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


#: Draws, as they were when they were looked at, and whether they are orthogonal.
_LOOKED_AT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _orthogonal(omega: Tensor, head_dim: int) -> bool:
    rows = torch.nn.functional.normalize(omega[:, :head_dim], dim=2)
    return bool((rows @ rows.mT - torch.eye(head_dim)).abs().max() < ORTHOGONAL)


def folds(p: FeatureParameters, head_dim: int, tokens: int) -> bool:
    """Whether the first d rows of Ω, d its columns, are orthogonal: over their lengths, ΩN is a turned N there.

    Rows that are parameters (`lfk`) do not stay orthogonal, so they have gradients of their own. A buffer may be
    changed, so its numbers are compared each time: cheaper than to look. Neither is possible in a trace.
    """
    omega = p.projection
    if omega is None or torch.compiler.is_compiling() or traced():
        return False
    if omega.requires_grad or omega.shape[1] < head_dim or omega.shape[2] != head_dim:
        return False
    if p.log_weight is not None and p.recalled is None:  # a product, made anew in each call
        return tokens >= SOME and _orthogonal(omega, head_dim)
    if type(omega) not in PLAIN:
        return False
    before, answer = _LOOKED_AT.get(omega, (omega.new_empty(0), False))
    if not same_numbers(before, omega):
        answer = _orthogonal(omega, head_dim)
        _LOOKED_AT[omega] = omega.detach().clone(), answer
    return answer


def _fold(omega: Tensor, shift: Tensor, other: Tensor | None) -> Tensor:
    """(G, 3, d): inverse lengths of the first rows of Ω; N's offset, turned like its rows; what joins all log-features.

    The turn is a constant, as in `_turn`: the gradient through P is that of N.
    """
    inverse = 1 / omega[:, : shift.shape[1]].norm(dim=2)
    turned = inverse * (omega[:, : shift.shape[1]] @ shift[:, :, None]).squeeze(-1)
    return torch.stack([inverse, turned, torch.zeros_like(shift) if other is None else other], dim=1)


class _Side(NamedTuple):
    """What one side's log-features are made of: ωᵀN(x - c) + otherᵀ(x - c) + gain - ½‖N(x - c)‖², x not scaled."""

    root: float  # N without a map: this times the identity
    map: Tensor | None  # (G, r, d) N
    turn: Tensor | None  # (G, r, r) what makes N triangular
    center: Tensor | None  # (G, d)
    other: Tensor | None  # (G, d)
    gain: Tensor | None  # (G,)


def _side(p: FeatureParameters, side: _Side, folded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[P; N] (G, m + d, d), [a; b] (G, m + d) with ℓ = P·x - a - ½‖N·x - b‖², and the fold.

    The term linear in x joins every row of P, or stands in the fold. A short call's time goes into these few products,
    so each is one operation of torch.
    """
    omega, (root, norm, turn, center, other, gain) = p.projection, side
    assert omega is not None
    constant = omega.new_full(omega.shape[:2], 0.5 * math.log(p.config.num_features))
    if p.log_weight is not None:
        constant = constant - 0.5 * p.log_weight
    if gain is not None:
        constant = constant - gain[:, None]
    joined = None if other is None or folded else other[:, None]
    if norm is None:
        norm = (root * torch.eye(omega.shape[2])).expand(omega.shape[0], -1, -1)
        rows = root * omega if joined is None else torch.add(joined, omega, alpha=root)
    else:
        rows = torch.bmm(omega, norm) if joined is None else torch.baddbmm(joined, omega, norm)
    fold = norm[:, :0]
    if folded:
        shift = norm.new_zeros(norm.shape[:2]) if center is None else (norm @ center[:, :, None]).squeeze(-1)
        fold = _fold(omega, shift, other)
        if center is not None and other is not None:
            constant = constant + (other * center).sum(-1, keepdim=True)
    if turn is not None:
        norm = turn @ norm
        norm = norm + (norm.triu() - norm).detach()
    w = torch.cat([rows, norm], dim=1)
    offset = torch.nn.functional.pad(constant, (0, norm.shape[1]))
    if center is not None:
        offset = torch.baddbmm(offset[:, :, None], w, center[:, :, None]).squeeze(-1)
    return w, offset, fold


def sides(p: FeatureParameters, groups: int, head_dim: int, scaling: float, *, tokens: int = 1) -> Maps:
    """The maps for raw (unscaled) queries and keys.

    The formulas are those of `features.log_features`: the query's side has cᵀ(q - b) and the far bias, the key's side
    bᵀk. There x̃ = √s·x stands for x: so the maps are √s times those of x̃, the centres 1/√s times.

    Args:
        tokens: that the maps are made for; with few of them nothing is made triangular, for 0 (`Step`) nothing folded.
    """
    return p.recall(
        (groups, head_dim, scaling, tokens >= MANY, tokens > 0), lambda: _sides(p, groups, head_dim, scaling, tokens)
    )


def _sides(p: FeatureParameters, groups: int, head_dim: int, scaling: float, tokens: int) -> Maps:
    if not p.config.feature_count:
        nothing = torch.zeros(groups, 0, head_dim)
        return Maps(nothing, nothing[..., 0], nothing, nothing[..., 0], nothing, nothing)
    b, c, bias, root = p.query_center, p.key_center, p.far_bias, scaling**0.5
    folded = tokens > 0 and folds(p, head_dim, tokens)

    def scaled(x: Tensor | None) -> Tensor | None:
        return None if x is None else root * x

    def raw(center: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return None if center is None else center / root, scaled(other)

    turn = None if folded else _turn(p.query_map, tokens)
    query_map = scaled(p.query_map)
    query = _side(p, _Side(root, query_map, turn, *raw(b, None if b is None else c), bias), folded)
    shared = p.key_map is p.query_map
    if shared and b is None and c is None and bias is None:  # the paper's form: made once
        key = query
    else:
        key_map = query_map if shared else scaled(p.key_map)
        turn = turn if shared or folded else _turn(p.key_map, tokens)
        gain = None if b is None or c is None else (b * c).sum(-1)  # bᵀk, not bᵀ(k - c)
        key = _side(p, _Side(root, key_map, turn, *raw(c, b), gain), folded)
    (wq, offq, foldq), (wk, offk, foldk) = query, key
    return Maps(wq, offq, wk, offk, foldq, foldk)
