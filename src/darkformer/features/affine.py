"""The formula of the log-features, written once: every backend, probe and estimator evaluates the forms built here.

exp(ℓ_q)·exp(ℓ_k) summed over the features estimates exp(q̃ᵀk̃) (with M = I), q̃ = √s·q, k̃ = √s·k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import DarkConfig
from .draws import hash_uniform


def full_precision(x: Tensor | None) -> torch.autocast:
    """Autocast off: cached tensors must not depend on the caller that happened to build them."""
    return torch.autocast("cpu" if x is None else x.device.type, enabled=False)


class FeatureParameters(NamedTuple):
    """One layer's tensors from which both sides' affine forms are built, in the compute dtype."""

    query_map: Tensor | None  # (G, r, d) M·A; None is the identity
    key_map: Tensor | None  # (G, r, d) M·B
    projection: Tensor | None  # (G, m, r) Ω
    query_center: Tensor | None  # (G, d) b, in units of q̃; there is none without a key_center
    key_center: Tensor | None  # (G, d) c, in units of k̃
    far_bias: Tensor | None  # (G,)
    log_weight: Tensor | None  # (G, m) log p_I(ω)/ψ(ω) of a weighted proposal, half of it for each side
    config: DarkConfig
    layer: int
    cache: dict[Any, Any] | None = None  # see `cached`

    def cached(self, key: Any, build: Callable[[], Any]) -> Any:
        """`build()`, kept under `key` as long as `FeatureMap.parameters_for` returns this very object.

        It does so until a number changes, so the result must depend on these numbers and `key` alone, and must not be
        written to.
        """
        cache = self.cache
        if cache is None or cache.get("parameters") is not self:  # differentiable, or a modified copy
            return build()
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in self):
            return build()  # taken without a gradient, used with one
        if key not in cache:
            with full_precision(self.projection):
                cache[key] = build()
        return cache[key]

    def scaled(self, scale: float) -> FeatureParameters:
        """Parameters of `scale` times the mapped queries and keys: a colder kernel for scale < 1."""
        if scale == 1.0 or self.projection is None:
            return self
        eye = torch.eye(self.projection.shape[-1]).to(self.projection)
        return self._replace(
            query_map=scale * (eye if self.query_map is None else self.query_map),
            key_map=scale * (eye if self.key_map is None else self.key_map),
        )


#: The tensors among the fields of `FeatureParameters`.
TENSOR_FIELDS = tuple(name for name in FeatureParameters._fields if name not in ("config", "layer", "cache"))


class Affine(NamedTuple):
    """One side's log-features of scaled tokens x: ℓ(x) = P·x - a - ½‖N·x - b‖² + uᵀx.

    N·x - b is the token in the coordinates of the draws (Lemma 2.1 of the paper: ωᵀy - ½‖y‖², so P = ΩN), u the term
    that centring moves out of the kernel. P and N share one matrix, because one product evaluates both.
    """

    weight: Tensor | None  # (G, m + r, d) P above N; None where a table gives the features
    offset: Tensor | None  # (G, m + r) a, then b; without a weight (G, 1) or None
    linear: Tensor | None  # (G, d) u
    num_features: int  # m
    table: Callable[[Tensor, Tensor], Tensor] | None = None  # (x, positions) → (B, G, T, m), in place of a weight
    # What a table reads besides x gets no gradient: `chunked` differentiates x and the three tensors above.

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, G, T, d), positions (B, T) → ℓ (B, G, T, m)."""
        if self.weight is None:
            assert self.table is not None
            features = self.table(x, positions)
            return features if self.offset is None else features - self.offset[:, None]
        assert self.offset is not None
        batch, m, tokens = x.shape[0], self.num_features, x.flatten(0, 1)
        # A batched product wants one matrix for each row of the batch and head.
        weight, offset = self.weight.repeat(batch, 1, 1).mT, self.offset.repeat(batch, 1)[:, None]
        features = torch.baddbmm(offset[..., :m], tokens, weight[..., :m], beta=-1)
        mapped = torch.baddbmm(offset[..., m:], tokens, weight[..., m:], beta=-1)
        shared = -0.5 * mapped.square().sum(-1, keepdim=True)
        if self.linear is not None:
            shared = torch.baddbmm(shared, tokens, self.linear.repeat(batch, 1)[..., None])
        shared = shared + 0 * shared  # NaN where it overflows: as -inf it would be a weight of 0 with a gradient of NaN
        return features.add_(shared).unflatten(0, x.shape[:2])

    def mapped(self, x: Tensor) -> Tensor:
        """N·x - b: x (…, G, T, d) as the features see it."""
        assert self.weight is not None and self.offset is not None
        m = self.num_features
        return x @ self.weight[:, m:].mT - self.offset[:, None, m:]

    def of_raw(self, root: float) -> Affine:
        """The form of raw tokens, whose scaled ones are `root` times as large."""
        weight, linear = (None if x is None else root * x for x in (self.weight, self.linear))
        if (table := self.table) is None:
            return self._replace(weight=weight, linear=linear)
        return self._replace(linear=linear, table=lambda x, positions: table(root * x, positions))

    @property
    def has_norm(self) -> bool:
        """Whether ½‖N·x - b‖² is part of it."""
        return self.weight is None or self.weight.shape[1] > self.num_features

    def without_norm(self) -> Affine:
        """Up to a term that all m features share, with fewer products."""
        if self.weight is None or self.offset is None:
            return self
        m = self.num_features
        return self._replace(weight=self.weight[:, :m], offset=self.offset[:, :m], linear=None)


def _gaussian_side(
    p: FeatureParameters, map: Tensor | None, center: Tensor | None, linear: Tensor | None, constant: Tensor | None
) -> Affine:
    """The form of y = map·(x - center): ωᵀy - ½‖y‖² + linearᵀx + constant (G,) and what both sides share."""
    omega = p.projection
    assert omega is not None
    # Half of log m for each side: the sum over features is then the mean over draws.
    offset = omega.new_full(omega.shape[:2], 0.5 * math.log(p.config.num_features))
    if p.log_weight is not None:
        offset = offset - 0.5 * p.log_weight
    if constant is not None:
        offset = offset - constant[:, None]
    if map is None:
        map, rows = torch.eye(omega.shape[2]).to(omega).expand(omega.shape[0], -1, -1), omega
    else:
        rows = torch.bmm(omega, map)
    weight = torch.cat([rows, map], dim=1)
    offset = torch.nn.functional.pad(offset, (0, map.shape[1]))
    if center is not None:
        offset = torch.baddbmm(offset[:, :, None], weight, center[:, :, None]).squeeze(-1)
    return Affine(weight, offset, linear, omega.shape[1])


def _gaussian(p: FeatureParameters) -> tuple[Affine, Affine]:
    """q̃ᵀk̃ = (q̃ - b)ᵀ(k̃ - c) + cᵀq̃ + bᵀk̃ - bᵀc: the three last terms put features and exact logits on one scale."""
    b, c, constant = p.query_center, p.key_center, p.far_bias
    if b is not None and c is not None:
        dropped = (b * c).sum(-1)
        constant = -dropped if constant is None else constant - dropped
    query = _gaussian_side(p, p.query_map, b, c, constant)
    # The paper's form has one map for both sides, and no term that belongs to one of them.
    if p.key_map is p.query_map and b is None and constant is None:
        return query, query
    return query, _gaussian_side(p, p.key_map, c, b, None)


def _tables(p: FeatureParameters, query: Any, key: Any, num_features: int) -> tuple[Affine, Affine]:
    """The forms of features that a function of scaled tokens and positions gives."""
    offset = None if p.far_bias is None else -p.far_bias[:, None]
    return Affine(None, offset, None, num_features, query), Affine(None, None, None, num_features, key)


def _constant(p: FeatureParameters) -> tuple[Affine, Affine]:
    """φ = 1: attention is the mean of the values."""
    m = p.config.num_features

    def table(x: Tensor, positions: Tensor) -> Tensor:
        return x.new_full((*x.shape[:3], m), -0.5 * math.log(m))

    return _tables(p, table, table, m)


def _random(p: FeatureParameters) -> tuple[Affine, Affine]:
    """exp(N(0, 1)) features that depend on (seed, layer, head, position, feature), never on the token."""
    m, seed = p.config.num_features, (p.config.seed * 4099 + p.layer) * 0x9E3779B97F4A7C1 % (1 << 62)

    def table(salt: int) -> Callable[[Tensor, Tensor], Tensor]:
        def normal(x: Tensor, positions: Tensor) -> Tensor:
            heads = torch.arange(x.shape[1], device=x.device)[:, None, None]
            index = torch.arange(m, device=x.device)
            counter = ((positions[:, None, :, None] * 1024 + heads) * 65536 + index) * 2 + salt
            return torch.special.ndtri(hash_uniform(counter + seed)).to(x.dtype) - 0.5 * math.log(m)

        return normal

    return _tables(p, table(0), table(1), m)


def _none(p: FeatureParameters) -> tuple[Affine, Affine]:
    def table(x: Tensor, positions: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:3], 0)

    return _tables(p._replace(far_bias=None), table, table, 0)


#: What the forms of queries and keys are, by method.
FORMS: dict[str, Callable[[FeatureParameters], tuple[Affine, Affine]]] = {
    "dark": _gaussian,
    "performer": _gaussian,
    "lfk": _gaussian,
    "random": _random,
    "constant": _constant,
    "local": _none,
    "exact": _none,
}


def affine(parameters: FeatureParameters) -> tuple[Affine, Affine]:
    """The forms of scaled queries and keys, differentiable in the parameters."""
    return parameters.cached("affine", lambda: FORMS[parameters.config.method](parameters))


def attention_forms(parameters: FeatureParameters) -> tuple[Affine, Affine]:
    """`affine` as attention evaluates it: without an exact part the query's norm is left out.

    A term that all features of a query share then cancels in the normaliser, while the features of a long query would
    lose their digits beside it.
    """
    query, key = affine(parameters)
    return (query if parameters.config.window + parameters.config.sinks else query.without_norm()), key


def query_log_features(parameters: FeatureParameters, query: Tensor, positions: Tensor) -> Tensor:
    """ℓ_q of scaled queries.

    Args:
        query: q̃ = √s·q, (B, G, T, d); the query heads of a group may be folded into T.
        positions: (B, T) position in the document (only `random` looks at it).

    Returns:
        (B, G, T, m), with -½log m, so that a sum over features is the mean over draws.
    """
    return affine(parameters)[0](query, positions)


def key_log_features(parameters: FeatureParameters, key: Tensor, positions: Tensor) -> Tensor:
    """ℓ_k of scaled keys k̃ = √s·k: (B, G, T, d), positions (B, T) → (B, G, T, m), with -½log m."""
    return affine(parameters)[1](key, positions)
