"""The feature map: the module that owns M, Ω, centres, balance and bias, and the pure log-feature functions.

exp(ℓ_q)·exp(ℓ_k) summed over the features estimates exp(q̃ᵀk̃) (with M = I), q̃ = √s·q, k̃ = √s·k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..config import ConfigError, DarkConfig
from .draws import draw_projection
from .proposals import log_weight
from .same import PLAIN, same_numbers
from .tracing import traced, transformed
from .transforms import symmetric_power


def _full_precision(x: Tensor | None) -> torch.autocast:
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
            with _full_precision(self.projection):
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


def _hash_uniform(counter: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) from int64 counters, the same on every device (the mixer of SplitMix64)."""
    h = counter * -7046029254386353131
    h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    h = (h ^ ((h >> 31) & 0x1FFFFFFFF)) & ((1 << 52) - 1)
    return (h.double() + 0.5) / (1 << 52)


def _random(salt: int) -> Callable[[FeatureParameters, Tensor, Tensor], Tensor]:
    """exp(N(0, 1)) features that depend on (seed, layer, head, position, feature), never on the token."""

    def log_features(parameters: FeatureParameters, x: Tensor, positions: Tensor) -> Tensor:
        heads = torch.arange(x.shape[1], device=x.device)[:, None, None]
        index = torch.arange(parameters.config.num_features, device=x.device)
        counter = ((positions[:, None, :, None] * 1024 + heads) * 65536 + index) * 2 + salt
        return torch.special.ndtri(
            _hash_uniform(counter + (parameters.config.seed * 4099 + parameters.layer) * 0x9E3779B97F4A7C1 % (1 << 62))
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


class _Known(NamedTuple):
    """The numbers of a feature map as they were, and the parameters made of them."""

    numbers: list[Tensor]
    tensors: list[int]  # their identities: what was made may hold them
    made_for: tuple[DarkConfig, int]
    parameters: FeatureParameters

    def holds(self, owned: list[Tensor], made_for: tuple[DarkConfig, int]) -> bool:
        """Whether they are the parameters of a map that owns these tensors."""
        same = self.made_for == made_for and self.tensors == list(map(id, owned))
        return same and all(map(same_numbers, self.numbers, owned))


#: Per feature map, by dtype and by whether inference mode, whose tensors no backward pass may keep, was on. Not an
#: attribute: copies and saved files of a map would hold it.
_KNOWN: WeakKeyDictionary[FeatureMap, dict[tuple[torch.dtype, bool], _Known]] = WeakKeyDictionary()


class FeatureMap(nn.Module):
    """Owns what the features of one attention layer are made of. All float32, whatever the model's dtype.

    Parameters and buffers (present only where the configuration uses them):
        geometry (G, r, d): M, one per key/value head; `dark` only. key_geometry when not `tied`.
        projection (G, m, r): Ω, a buffer; a parameter for `lfk`.
        query_center, key_center (G, d): b and c, in units of √s·q and √s·k.
        query_balance, key_balance (G, d, d): A and B (calibration sets B = A⁻ᵀ).
        far_bias (G,): log-weight of the features against the exact part.
        proposal_root (G, r, r): Σ*^½ of the proposal the rows of Ω are drawn from, a buffer; absent for `isotropic`,
            the identity until `propose_`.

    Raises:
        ConfigError: head counts that do not divide, or dimensions below 1.
    """

    geometry: nn.Parameter | None
    key_geometry: nn.Parameter | None
    query_center: nn.Parameter | None
    key_center: nn.Parameter | None
    query_balance: nn.Parameter | None
    key_balance: nn.Parameter | None
    far_bias: nn.Parameter | None
    projection: Tensor | None
    proposal_root: Tensor | None

    def __init__(self, config: DarkConfig, *, num_heads: int, num_kv_heads: int, head_dim: int, layer: int = 0) -> None:
        super().__init__()
        if min(num_heads, num_kv_heads, head_dim) < 1:
            raise ConfigError(
                f"num_heads={num_heads}, num_kv_heads={num_kv_heads}, head_dim={head_dim}: all must be >= 1."
            )
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}: "
                "every key/value head serves the same number of query heads."
            )
        self.config, self.layer = config, layer
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        gaussian = config.method in ("dark", "performer", "lfk")
        eye = torch.eye(head_dim, dtype=torch.float32).expand(num_kv_heads, -1, -1)
        self._own("geometry", eye, config.method == "dark")
        self._own("key_geometry", eye, config.method == "dark" and not config.tied)
        zeros = torch.zeros(num_kv_heads, head_dim, dtype=torch.float32)
        self._own("query_center", zeros, gaussian and config.center)
        self._own("key_center", zeros, gaussian and config.center)
        self._own("query_balance", eye, gaussian and config.balance)
        self._own("key_balance", eye, gaussian and config.balance)
        # Without an exact part there is nothing to weigh the features against.
        biased = config.far_bias and config.feature_count > 0 and config.window + config.sinks > 0
        self._own("far_bias", torch.zeros(num_kv_heads, dtype=torch.float32), biased)
        self._make_projection(gaussian)
        proposed = gaussian and config.proposal != "isotropic"
        self.register_buffer("proposal_root", eye.clone() if proposed else None)

    def _own(self, name: str, start: Tensor, present: bool) -> None:
        self.register_parameter(name, nn.Parameter(start.clone()) if present else None)

    def _make_projection(self, gaussian: bool) -> None:
        config, shape = self.config, (self.num_kv_heads, self.config.num_features, self.head_dim)
        if not gaussian:
            self.register_buffer("projection", None)
            return
        if torch.get_default_device().type == "meta":  # being built to receive saved weights: nothing to draw
            projection = torch.empty(shape, dtype=torch.float32)
        else:
            projection = self._draw(0).to(torch.get_default_device(), torch.float32)
        if config.method == "lfk":
            self.projection = nn.Parameter(projection)
        else:
            self.register_buffer("projection", projection)

    def _draw(self, step: int) -> Tensor:
        return draw_projection(
            self.config.draw, self.config.num_features, self.head_dim,
            num_kv_heads=self.num_kv_heads, seed=self.config.seed, layer=self.layer, step=step,
        )  # fmt: skip

    @torch.no_grad()
    def redraw_(self, step: int) -> bool:
        """New rows of Ω, those of (seed, step, layer, head); step 0 gives the first ones back. In place.

        Returns:
            False where there is nothing to redraw: methods without draws, and `lfk`, whose Ω is learned.
        """
        if self.projection is None or isinstance(self.projection, nn.Parameter):
            return False
        self.projection.copy_(self._draw(step))  # a new tensor would no longer be synchronised under DDP
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureMap:
        # `model.to(bfloat16)` must not round M and Ω: keep the device of the move, drop the lower precision.
        if fn(torch.zeros(0, dtype=torch.float32, device="cpu")).dtype in (torch.bfloat16, torch.float16):
            lowering = fn
            fn = lambda t: t.to(lowering(t[:0] if t.dim() else t).device)  # noqa: E731
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{c.method}, m={c.num_features}, window={c.window}, sinks={c.sinks}, "
            f"heads={self.num_heads}/{self.num_kv_heads}, d={self.head_dim}"
        )

    def parameters_for(self, dtype: torch.dtype) -> FeatureParameters:
        """The layer's `FeatureParameters` in `dtype` (float32 or float64), differentiable.

        Without a gradient the same object comes back until a number changes, so that what is made of it can be kept.
        The numbers themselves are compared: a write through `.data` leaves no other trace.
        """
        owned = [x for x in (*self._parameters.values(), *self._buffers.values()) if x is not None]
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in owned)
        # Elsewhere than on the CPU a comparison waits for the device, and nothing is made of what is kept.
        comparable = all(type(x) in PLAIN and x.device.type == "cpu" for x in owned)
        if differentiable or torch.compiler.is_compiling() or transformed() or traced() or not comparable:
            return self._make(dtype)
        known, key = _KNOWN.setdefault(self, {}), (dtype, torch.is_inference_mode_enabled())
        last, made_for = known.get(key), (self.config, self.layer)
        if last is None or not last.holds(owned, made_for):
            made: dict[Any, Any] = {}
            with _full_precision(self.projection), torch.no_grad():
                made["parameters"] = self._make(dtype)._replace(recalled=made)
            numbers = [x.detach().clone() for x in owned]
            last = known[key] = _Known(numbers, list(map(id, owned)), made_for, made["parameters"])
        return last.parameters

    def _make(self, dtype: torch.dtype) -> FeatureParameters:
        weighted = self.proposal_root is not None and self.config.proposal_weights

        def product(*factors: Tensor | None) -> Tensor | None:
            given = [factor.to(dtype) for factor in factors if factor is not None]
            return functools.reduce(torch.matmul, given) if given else None

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        key_geometry = self.geometry if self.key_geometry is None else self.key_geometry
        root, projection = cast(self.proposal_root), cast(self.projection)
        # ωᵀRy with ω ~ N(0, I) is a draw of N(0, Σ*). With weights only the draw is R's; without them R is part of M.
        unweighted = None if weighted else root
        return FeatureParameters(
            query_map=product(unweighted, self.geometry, self.query_balance),
            key_map=product(unweighted, key_geometry, self.key_balance),
            projection=product(projection, root) if weighted else projection,
            query_center=cast(self.query_center),
            key_center=cast(self.key_center),
            far_bias=cast(self.far_bias),
            log_weight=log_weight(projection, root)
            if weighted and projection is not None and root is not None
            else None,
            config=self.config,
            layer=self.layer,
        )

    @torch.no_grad()
    def propose_(self, covariance: Tensor) -> None:
        """Sets the proposal N(0, Σ*) of the rows of Ω, Σ* = `covariance` (G, r, r) in the maps' coordinates. In place.

        Raises:
            ConfigError: the configuration's proposal is `isotropic`, or the method draws nothing.
        """
        if self.proposal_root is None:
            raise ConfigError(f"proposal={self.config.proposal!r} with method={self.config.method!r} has none to set.")
        self.proposal_root.copy_(symmetric_power(covariance.double(), 0.5))

    def covariance(self) -> Tensor:
        """Σ = MᵀM of the paper, (G, d, d): the identity where the method has no geometry."""
        if self.geometry is None:
            return torch.eye(self.head_dim).expand(self.num_kv_heads, -1, -1)
        return self.geometry.mT @ self.geometry

    @torch.no_grad()
    def scale_(self, scale: Tensor) -> None:
        """Multiplies the maps of queries and keys by `scale` (G,): a colder kernel for scale < 1. In place.

        The factor goes into M where there is one, else into the balance; without either there is nothing to scale.
        """
        names = ["geometry", "key_geometry"] if self.geometry is not None else ["query_balance", "key_balance"]
        for name in names:
            if (owned := getattr(self, name)) is not None:
                owned.mul_(scale.to(owned)[:, None, None])

    @torch.no_grad()
    def reset_geometry_(self) -> None:
        """M back to the identity, where it started. In place."""
        for geometry in (self.geometry, self.key_geometry):
            if geometry is not None:
                geometry.copy_(torch.eye(self.head_dim, dtype=geometry.dtype, device=geometry.device))

    @property
    def scalable(self) -> bool:
        """Whether `scale_` has something to scale."""
        return self.geometry is not None or self.query_balance is not None


def feature_map(config: DarkConfig, **shape: Any) -> FeatureMap:
    """Makes the feature map of one layer: `feature_map(config, num_heads=9, num_kv_heads=3, head_dim=64)`.

    Keyword Args:
        num_heads, num_kv_heads, head_dim: the layer's H, G, d. layer: mixed into the seed (default 0).

    Raises:
        ConfigError: see `FeatureMap`.
    """
    return FeatureMap(config, **shape)
