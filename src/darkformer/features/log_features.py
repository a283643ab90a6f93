"""The log-features of every method: pure functions of what one layer's features need.

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
    """Autocast off: what is kept must not depend on where it was made."""
    return torch.autocast("cpu" if x is None else x.device.type, enabled=False)


class FeatureParameters(NamedTuple):
    """What the log-features of one layer need, with the products that do not depend on tokens already made."""

    query_map: Tensor | None  # (G, r, d) M·A; None is the identity
    key_map: Tensor | None  # (G, r, d) M·B
    projection: Tensor | None  # (G, m, r)
    query_center: Tensor | None  # (G, d) b, in units of q̃
    key_center: Tensor | None  # (G, d) c, in units of k̃
    far_bias: Tensor | None  # (G,)
    log_weight: Tensor | None  # (G, m) log p_I(ω)/ψ(ω) of a weighted proposal, half of it for each side
    config: DarkConfig
    layer: int
    recalled: dict[Any, Any] | None = None  # see `recall`

    def recall(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, kept under `key` where `FeatureMap.parameters_for` returns this very object until a number changes.

        So what is made must depend on these numbers and `key` alone, and must not be changed.
        """
        found = self.recalled
        if found is None or found.get("parameters") is not self:  # differentiable, or a changed copy
            return make()
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in self):
            return make()  # taken without a gradient, used with one
        if key not in found:
            with full_precision(self.projection):
                found[key] = make()
        return found[key]

    def scaled(self, scale: float) -> FeatureParameters:
        """Those of `scale` times the mapped queries and keys: a colder kernel for scale < 1."""
        if scale == 1.0 or self.projection is None:
            return self
        eye = torch.eye(self.projection.shape[-1]).to(self.projection)
        return self._replace(
            query_map=scale * (eye if self.query_map is None else self.query_map),
            key_map=scale * (eye if self.key_map is None else self.key_map),
        )


def _gaussian(parameters: FeatureParameters, x: Tensor, linear: Tensor | None, center: Tensor | None) -> Tensor:
    """ωᵀy - ½‖y‖² with y = linear·(x - center). x (B, G, T, d) → (B, G, T, m). Lemma 2.1 of the paper."""
    assert parameters.projection is not None
    if center is not None:
        x = x - center[:, None, :]
    y = x if linear is None else x @ linear.mT
    features = y @ parameters.projection.mT - 0.5 * y.square().sum(-1, keepdim=True)
    return features if parameters.log_weight is None else features + 0.5 * parameters.log_weight[:, None, :]


def _gaussian_query(parameters: FeatureParameters, x: Tensor, positions: Tensor) -> Tensor:
    features = _gaussian(parameters, x, parameters.query_map, parameters.query_center)
    if parameters.key_center is not None and parameters.query_center is not None:
        # The terms cᵀq - bᵀc that centring took from the kernel: they put features and exact logits on one scale.
        dropped = x @ parameters.key_center[:, :, None]
        features = features + dropped - (parameters.query_center * parameters.key_center).sum(-1)[:, None, None]
    return features


def _gaussian_key(parameters: FeatureParameters, x: Tensor, positions: Tensor) -> Tensor:
    features = _gaussian(parameters, x, parameters.key_map, parameters.key_center)
    if parameters.query_center is not None:
        features = features + x @ parameters.query_center[:, :, None]
    return features


def _constant(parameters: FeatureParameters, x: Tensor, positions: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:3], parameters.config.num_features)


def _random(salt: int) -> Callable[[FeatureParameters, Tensor, Tensor], Tensor]:
    """exp(N(0, 1)) features that depend on (seed, layer, head, position, feature), never on the token."""

    def log_features(parameters: FeatureParameters, x: Tensor, positions: Tensor) -> Tensor:
        heads = torch.arange(x.shape[1], device=x.device)[:, None, None]
        index = torch.arange(parameters.config.num_features, device=x.device)
        counter = ((positions[:, None, :, None] * 1024 + heads) * 65536 + index) * 2 + salt
        return torch.special.ndtri(
            hash_uniform(counter + (parameters.config.seed * 4099 + parameters.layer) * 0x9E3779B97F4A7C1 % (1 << 62))
        ).to(x.dtype)

    return log_features


def _none(parameters: FeatureParameters, x: Tensor, positions: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:3], 0)


LogFeatures = Callable[[FeatureParameters, Tensor, Tensor], Tensor]
LOG_FEATURES: dict[str, tuple[LogFeatures, LogFeatures]] = {
    "dark": (_gaussian_query, _gaussian_key),
    "performer": (_gaussian_query, _gaussian_key),
    "lfk": (_gaussian_query, _gaussian_key),
    "random": (_random(0), _random(1)),
    "constant": (_constant, _constant),
    "local": (_none, _none),
    "exact": (_none, _none),
}


def query_log_features(parameters: FeatureParameters, query: Tensor, positions: Tensor) -> Tensor:
    """ℓ_q of scaled queries.

    Args:
        query: q̃ = √s·q, (B, G, T, d); the query heads of a group may be folded into T.
        positions: (B, T) position in the document (only `random` looks at it).

    Returns:
        (B, G, T, m), with -½log m, so that a sum over features is the mean over draws.
    """
    config = parameters.config
    features = LOG_FEATURES[config.method][0](parameters, query, positions)
    if parameters.far_bias is not None:
        features = features + parameters.far_bias[:, None, None]
    return features - 0.5 * math.log(config.num_features)


def key_log_features(parameters: FeatureParameters, key: Tensor, positions: Tensor) -> Tensor:
    """ℓ_k of scaled keys k̃ = √s·k: (B, G, T, d), positions (B, T) → (B, G, T, m), with -½log m."""
    config = parameters.config
    return LOG_FEATURES[config.method][1](parameters, key, positions) - 0.5 * math.log(config.num_features)
