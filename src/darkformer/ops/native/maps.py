"""Packs the affine forms of `features.affine` into what the library reads, differentiable in all of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...features.affine import Affine, FeatureParameters, affine
from ...features.same import DENSE_TYPES, same_numbers
from ...features.tracing import traced

#: Tokens from which a QR factorisation per kv head (0.1 ms at d = 64) costs less than the half product it saves.
TRIANGULAR_TOKENS = 4096
#: Tokens from which testing draws for orthogonality pays off where they are computed anew in each call: 0.8 ms for
#: 8 kv heads at d = 64.
ORTHOGONAL_TOKENS = 2048
#: Largest |cosine| between rows of Ω that count as orthogonal. Draws are made in float64 and kept in float32.
ORTHOGONAL = 1e-5


class Packed(NamedTuple):
    """The forms of raw (unscaled) tokens: fields of `load.Inputs`, under the same names."""

    map_q: Tensor  # (G, m + r, d) [P; N]
    offset_q: Tensor  # (G, m + r) [a; b]
    map_k: Tensor
    offset_k: Tensor
    fold_q: Tensor  # (G, 3, d) see `_fold`; (G, 0, d) where N has a product of its own
    fold_k: Tensor


#: Draws as they were when tested, and whether they are orthogonal.
_TESTED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _orthogonal(omega: Tensor, head_dim: int) -> bool:
    rows = torch.nn.functional.normalize(omega[:, :head_dim], dim=2)
    return bool((rows @ rows.mT - torch.eye(head_dim)).abs().max() < ORTHOGONAL)


def folds(p: FeatureParameters, head_dim: int, tokens: int) -> bool:
    """Whether the first d rows of Ω, d its columns, are orthogonal: divided by their lengths, ΩN is a rotated N there.

    Rows that are parameters (`lfk`) do not stay orthogonal, so they have gradients of their own. A buffer may be
    modified, so its numbers are compared each time, which is cheaper than the test. A trace can do neither.
    """
    omega = p.projection
    if omega is None or torch.compiler.is_compiling() or traced():
        return False
    if omega.requires_grad or omega.shape[1] < head_dim or omega.shape[2] != head_dim:
        return False
    if p.log_weight is not None and p.cache is None:  # a product, computed anew in each call
        return tokens >= ORTHOGONAL_TOKENS and _orthogonal(omega, head_dim)
    if type(omega) not in DENSE_TYPES:
        return False
    before, answer = _TESTED.get(omega, (omega.new_empty(0), False))
    if not same_numbers(before, omega):
        answer = _orthogonal(omega, head_dim)
        _TESTED[omega] = omega.detach().clone(), answer
    return answer


def _fold(omega: Tensor, form: Affine) -> Tensor:
    """(G, 3, d): inverse lengths of the first rows of Ω; b, rotated like N; the term that joins all log-features.

    The rotation is a constant: ‖y‖ does not change as y rotates, so the gradient through P is that of N.
    """
    assert form.offset is not None
    head_dim = omega.shape[2]
    inverse = 1 / omega[:, :head_dim].norm(dim=2)
    rotated = inverse * (omega[:, :head_dim] @ form.offset[:, form.num_features :, None]).squeeze(-1)
    return torch.stack([inverse, rotated, torch.zeros_like(rotated) if form.linear is None else form.linear], dim=1)


def _triangular(weight: Tensor, offset: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Replaces N = QR by R and b by Qᵀb: ‖R·x - Qᵀb‖ = ‖N·x - b‖, and the library multiplies by half of R only.

    Q is a constant, as in `_fold`, so the gradient that reaches N through R = QᵀN is N's own, if all of R has one, its
    zeros too.
    """
    rotation = torch.linalg.qr(weight[:, m:].detach()).Q.mT
    norm = rotation @ weight[:, m:]
    norm = norm + (norm.triu() - norm).detach()
    b = (rotation @ offset[:, m:, None]).squeeze(-1)
    return torch.cat([weight[:, :m], norm], dim=1), torch.cat([offset[:, :m], b], dim=1)


def _pack_side(form: Affine, omega: Tensor, *, folded: bool, triangular: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, offset and fold of one side's form of raw tokens."""
    m, weight, offset, linear = form.num_features, form.weight, form.offset, form.linear
    assert weight is not None and offset is not None
    if folded:
        return weight, offset, _fold(omega, form)
    if linear is not None:
        weight = torch.cat([weight[:, :m] + linear[:, None], weight[:, m:]], dim=1)
    if triangular:
        weight, offset = _triangular(weight, offset, m)
    return weight, offset, weight[:, :0]


def pack(p: FeatureParameters, groups: int, head_dim: int, scaling: float, *, tokens: int = 1) -> Packed:
    """The packed forms.

    Args:
        tokens: of the call; with few of them nothing is made triangular, for 0 (`Step`) nothing folded.
    """

    def build() -> Packed:
        omega = p.projection
        if omega is None:
            empty = torch.zeros(groups, 0, head_dim)
            return Packed(empty, empty[..., 0], empty, empty[..., 0], empty, empty)
        folded, root = tokens > 0 and folds(p, head_dim, tokens), scaling**0.5

        def side(form: Affine, map: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            square = map is not None and map.shape[1] <= map.shape[2]
            triangular = square and not folded and tokens >= TRIANGULAR_TOKENS
            return _pack_side(form.of_raw(root), omega, folded=folded, triangular=triangular)

        query, key = affine(p)
        map_q, offset_q, fold_q = side(query, p.query_map)
        map_k, offset_k, fold_k = (map_q, offset_q, fold_q) if key is query else side(key, p.key_map)
        return Packed(map_q, offset_q, map_k, offset_k, fold_q, fold_k)

    return p.cached((groups, head_dim, scaling, tokens >= TRIANGULAR_TOKENS, tokens > 0), build)
