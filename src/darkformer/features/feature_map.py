"""The feature map: the module that owns M, Ω, centres, balance and bias."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..config import DarkConfig
from ..cost import check_memory
from ..errors import ConfigError
from .affine import FeatureParameters, full_precision
from .draws import draw_projection
from .proposals import log_determinant, log_weight
from .same import DENSE_TYPES, rounds, same_numbers
from .tracing import traced, transformed
from .transforms import symmetric_power


class _Cached(NamedTuple):
    """Parameters, and what they were computed from."""

    numbers: list[Tensor]  # copies of the map's tensors
    tensors: list[int]  # identities of these tensors: the parameters may refer to them
    source: tuple[DarkConfig, int]
    parameters: FeatureParameters

    def is_current(self, owned: list[Tensor], source: tuple[DarkConfig, int]) -> bool:
        """Whether a map that owns these tensors would compute the same parameters."""
        same = self.source == source and self.tensors == list(map(id, owned))
        return same and all(map(same_numbers, self.numbers, owned))


#: Per feature map, by dtype and by whether inference mode was on, whose tensors no backward pass may keep. Not an
#: attribute: copies and saved files of a map would hold it.
_CACHE: WeakKeyDictionary[FeatureMap, dict[tuple[torch.dtype, bool], _Cached]] = WeakKeyDictionary()

#: What may be learned: a buffer where training starts, and a parameter `…_offset` where it is learned.
LEARNED = (
    "geometry", "key_geometry", "query_center", "key_center", "query_balance", "key_balance", "far_bias", "projection",
)  # fmt: skip
#: Every buffer and parameter there may be; those that a configuration does not use are registered as None.
_OWNED = (*(f"{name}_offset" for name in LEARNED), *LEARNED, "proposal_root")
#: Bytes a number of Ω takes while it is drawn: float64 by head and stacked, float32 and its copy.
DRAW_BYTES = 24
_HALF = (torch.bfloat16, torch.float16)


def _add(start: Tensor, offset: Tensor) -> Tensor:
    """start + offset in the start's dtype; a half-precision offset is widened before it is added."""
    if type(offset) not in DENSE_TYPES and hasattr(offset, "full_tensor"):  # FSDP2, outside of its forward pass
        offset = offset.full_tensor()
    return (start + offset).to(start.dtype)


class FeatureMap(nn.Module):
    """Owns what the features of one attention layer are made of.

    It does not compute them: calling it runs a function that reads it, with its weights in place, and features come
    from `affine.query_log_features` and `key_log_features` of `parameters_for(dtype)`.

    What can be learned is a float32 buffer, where training starts (what conversion or calibration set), plus a
    parameter `<name>_offset`, zero at first, which is what training changes: weight decay, of any optimizer, pulls
    towards the start. The offsets have the model's dtype, because what shards a model wants one dtype in a unit; their
    sum, which `learned` gives, is float32 whatever that is.

    Present only where the configuration uses them:
        geometry (G, r, d): M, one per key/value head; `dark` only. key_geometry when not `tied`.
        projection (G, m, r): Ω; learned by `lfk` only, elsewhere a buffer without an offset.
        query_center, key_center (G, d): b and c, in units of √s·q and √s·k.
        query_balance, key_balance (G, d, d): A and B (calibration sets B = A⁻ᵀ).
        far_bias (G,): log-weight of the features against the exact part.
        proposal_root (G, r, r): Σ*^½ of the proposal the rows of Ω are drawn from, a buffer; absent for `isotropic`,
            the identity until `propose_`.

    Args:
        num_heads, num_kv_heads, head_dim: H, G, d of the heads that it serves. layer: mixed into the seed.
        dtype: of the offsets; torch's default dtype without.
        heads: numbers of its key/value heads in the layer, where other heads of the layer compute something else.

    Raises:
        ConfigError: head counts that do not divide, dimensions below 1, or more features than this machine can hold.
    """

    geometry: Tensor | None
    key_geometry: Tensor | None
    query_center: Tensor | None
    key_center: Tensor | None
    query_balance: Tensor | None
    key_balance: Tensor | None
    far_bias: Tensor | None
    projection: Tensor | None
    proposal_root: Tensor | None
    geometry_offset: nn.Parameter | None
    key_geometry_offset: nn.Parameter | None
    query_center_offset: nn.Parameter | None
    key_center_offset: nn.Parameter | None
    query_balance_offset: nn.Parameter | None
    key_balance_offset: nn.Parameter | None
    far_bias_offset: nn.Parameter | None
    projection_offset: nn.Parameter | None

    def __init__(
        self,
        config: DarkConfig,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int = 0,
        dtype: torch.dtype | None = None,
        heads: tuple[int, ...] | None = None,
    ) -> None:
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
        check_memory(
            DRAW_BYTES * num_kv_heads * config.feature_count * head_dim,
            f"num_features={config.num_features} in {num_kv_heads} key/value heads of dimension {head_dim}",
        )
        self.config, self.layer = config, layer
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.heads = tuple(range(num_kv_heads)) if heads is None else heads
        dtype = torch.get_default_dtype() if dtype is None else dtype
        gaussian = config.method in ("dark", "performer", "lfk")
        eye = torch.eye(head_dim, dtype=torch.float32).expand(num_kv_heads, -1, -1)
        zeros = torch.zeros(num_kv_heads, head_dim, dtype=torch.float32)
        # Without an exact part there is nothing to weigh the features against.
        biased = config.far_bias and config.feature_count > 0 and config.window + config.sinks > 0
        self._own("geometry", eye if config.method == "dark" else None, dtype)
        self._own("key_geometry", eye if config.method == "dark" and not config.tied else None, dtype)
        self._own("query_center", zeros if gaussian and config.center else None, dtype)
        self._own("key_center", zeros if gaussian and config.center else None, dtype)
        self._own("query_balance", eye if gaussian and config.balance else None, dtype)
        self._own("key_balance", eye if gaussian and config.balance else None, dtype)
        self._own("far_bias", zeros[:, 0] if biased else None, dtype)
        self._own("projection", self._first_draw() if gaussian else None, dtype if config.method == "lfk" else None)
        proposed = gaussian and config.proposal != "isotropic"
        self.register_buffer("proposal_root", eye.clone() if proposed else None)

    def _own(self, name: str, start: Tensor | None, dtype: torch.dtype | None) -> None:
        """Registers where `name` starts, and its offset if it has a dtype."""
        offset = None if start is None or dtype is None else nn.Parameter(torch.zeros_like(start, dtype=dtype))
        self.register_buffer(name, None if start is None else start.clone(memory_format=torch.contiguous_format))
        self.register_parameter(f"{name}_offset", offset)

    def _first_draw(self) -> Tensor:
        if torch.get_default_device().type == "meta":  # being built to receive saved weights: nothing to draw
            return torch.empty(self.num_kv_heads, self.config.num_features, self.head_dim, dtype=torch.float32)
        return self._draw(0).to(torch.get_default_device(), torch.float32)

    def _draw(self, step: int) -> Tensor:
        return draw_projection(
            self.config.draw, self.config.num_features, self.head_dim,
            heads=self.heads, seed=self.config.seed, layer=self.layer, step=step,
        )  # fmt: skip

    @torch.no_grad()
    def redraw_(self, step: int) -> bool:
        """New rows of Ω, those of (seed, step, layer, head); step 0 gives the first ones back. In place.

        Returns:
            False where there is nothing to redraw: methods without draws, and `lfk`, whose Ω is learned.
        """
        if self.projection is None or self.projection_offset is not None:
            return False
        self.projection.copy_(self._draw(step))  # a new tensor would no longer be synchronised under DDP
        return True

    def forward(self, run: Callable[..., Any], *tensors: Any) -> Any:
        """`run(self, *tensors)`, for whatever reads this map.

        So whatever loads or gathers weights around a module's forward pass (accelerate's offload, FSDP, ZeRO-3), or
        changes them for it (peft's `target_parameters`), has them in place while the operator reads them.
        """
        return run(self, *tensors)

    def learned(self, name: str) -> Tensor | None:
        """The value of one of `LEARNED`, start + offset in the start's dtype, differentiable; None where it is absent.

        Both are read as attributes: `torch.nn.utils.parametrize` may stand in for either.
        """
        start, offset = getattr(self, name), getattr(self, f"{name}_offset")
        return start if start is None or offset is None else _add(start, offset)

    @torch.no_grad()
    def values(self, read: Callable[[str], Tensor | None] | None = None) -> dict[str, Tensor]:
        """What the map computes with, by name: `set_` takes it. Bit for bit the start where nothing was learned.

        Args:
            read: how a tensor is read by its name, where something keeps them elsewhere between calls.
        """
        read = functools.partial(getattr, self) if read is None else read
        values = {}
        for name in (*LEARNED, "proposal_root"):
            x, offset = read(name), read(f"{name}_offset") if name in LEARNED else None
            if x is not None and offset is not None and bool(offset.any()):  # -0 + 0 would be 0
                x = _add(x, offset)
            if x is not None:
                values[name] = x.detach()
        return values

    @torch.no_grad()
    def set_(self, name: str, value: Tensor) -> None:
        """Makes `value` what `learned(name)` gives, and where training starts. In place.

        Raises:
            ConfigError: this map has no such tensor, or `torch.nn.utils.parametrize` computes it.
        """
        start, offset = self._buffers.get(name), self._parameters.get(f"{name}_offset")
        computed = getattr(self, name, None) is not start or getattr(self, f"{name}_offset", None) is not offset
        if start is None or computed:
            why = "is parametrized: remove the parametrization first" if computed else "has no such tensor"
            raise ConfigError(f"cannot set {name} of layer {self.layer} (method={self.config.method!r}), which {why}.")
        start.copy_(value)
        if offset is not None:
            offset.zero_()

    @torch.no_grad()
    def _fold_(self, dtype: torch.dtype) -> None:
        """Moves into the starts what offsets of `dtype` could not hold."""
        for name in LEARNED:
            start, offset = self._buffers.get(name), self._parameters.get(f"{name}_offset")
            if start is None or offset is None or not rounds(offset, dtype):
                continue
            value = self.learned(name)
            assert value is not None
            start.copy_(value)
            offset.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureMap:
        # `model.to(bfloat16)` must not round M and Ω: buffers keep the device of the move and drop the lower precision.
        dtype = fn(torch.zeros(0, dtype=torch.float32, device="cpu")).dtype
        if dtype in _HALF:
            self._fold_(dtype)
            starts = {id(x) for x in self.buffers()}

            def lowered(x: Tensor) -> Tensor:
                return x.to(fn(x[:0] if x.dim() else x).device) if id(x) in starts else fn(x)

            return super()._apply(lowered, recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # Version 0.1.0 had parameters without offsets. And what is loaded must not be rounded, as in `_apply`.
        own = {name: x for name in LEARNED if (x := self._parameters.get(f"{name}_offset")) is not None}
        older = not any(f"{prefix}{name}_offset" in state_dict for name in own)
        for name, offset in own.items():
            start, key = state_dict.get(prefix + name), f"{prefix}{name}_offset"
            if not isinstance(start, Tensor):
                continue
            device = start.device if offset.is_meta else offset.device
            if older:
                state_dict[key] = torch.zeros_like(offset, device=device, requires_grad=False)
            elif local_metadata.get("assign_to_params_buffers") or not isinstance(state_dict.get(key), Tensor):
                continue
            elif offset.dtype in _HALF and rounds(state_dict[key], offset.dtype):
                state_dict[prefix + name] = (start + state_dict[key]).to(start.dtype)
                state_dict[key] = torch.zeros_like(offset, device=device, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{c.method}, m={c.num_features}, window={c.window}, sinks={c.sinks}, "
            f"heads={self.num_heads}/{self.num_kv_heads}, d={self.head_dim}"
        )

    def parameters_for(self, dtype: torch.dtype) -> FeatureParameters:
        """The layer's `FeatureParameters` in `dtype` (float32 or float64), differentiable.

        Without a gradient the same object comes back until a number changes, so what is derived from it can be kept.
        The numbers themselves are compared: a write through `.data` leaves no other trace.
        """
        tables = (*self._parameters.values(), *self._buffers.values())
        if len(tables) != len(_OWNED):  # a parametrization or FSDP1 has put some elsewhere, under the same names
            tables = tuple(getattr(self, name) for name in _OWNED)
        owned = [x for x in tables if x is not None]
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in owned)
        # On other devices than the CPU the comparison would wait for the device, and it would save little.
        comparable = all(type(x) in DENSE_TYPES and x.is_cpu for x in owned)
        if differentiable or torch.compiler.is_compiling() or transformed() or traced() or not comparable:
            return self._make(dtype)
        cached, key = _CACHE.setdefault(self, {}), (dtype, torch.is_inference_mode_enabled())
        last, source = cached.get(key), (self.config, self.layer)
        if last is None or not last.is_current(owned, source):
            derived: dict[Any, Any] = {}
            with full_precision(self.projection), torch.no_grad():
                derived["parameters"] = self._make(dtype)._replace(cache=derived)
            copies = [x.detach().clone() for x in owned]
            last = cached[key] = _Cached(copies, list(map(id, owned)), source, derived["parameters"])
        return last.parameters

    def _make(self, dtype: torch.dtype) -> FeatureParameters:
        weighted = self.proposal_root is not None and self.config.proposal_weights

        def product(*factors: Tensor | None) -> Tensor | None:
            present = [factor.to(dtype) for factor in factors if factor is not None]
            return functools.reduce(torch.matmul, present) if present else None

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        geometry, key_geometry = self.learned("geometry"), self.learned("key_geometry")
        key_geometry = geometry if key_geometry is None else key_geometry
        root, projection = cast(self.proposal_root), cast(self.learned("projection"))
        # ωᵀRy with ω ~ N(0, I) is a draw of N(0, Σ*). With weights only the draw is R's; without them R is part of M.
        unweighted = None if weighted else root
        return FeatureParameters(
            query_map=product(unweighted, geometry, self.learned("query_balance")),
            key_map=product(unweighted, key_geometry, self.learned("key_balance")),
            projection=product(projection, root) if weighted else projection,
            query_center=cast(self.learned("query_center")),
            key_center=cast(self.learned("key_center")),
            far_bias=cast(self.learned("far_bias")),
            log_weight=log_weight(projection, root, log_determinant(self.proposal_root))
            if weighted and projection is not None and root is not None and self.proposal_root is not None
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
        geometry = self.learned("geometry")
        if geometry is None:
            return torch.eye(self.head_dim).expand(self.num_kv_heads, -1, -1)
        return geometry.mT @ geometry

    @torch.no_grad()
    def scale_(self, scale: Tensor) -> None:
        """Multiplies the maps of queries and keys by `scale` (G,): a colder kernel for scale < 1. In place.

        The factor goes into M where there is one, else into the balance; without either there is nothing to scale.
        """
        names = ["geometry", "key_geometry"] if self.geometry is not None else ["query_balance", "key_balance"]
        for name in names:
            if (value := self.learned(name)) is not None:
                self.set_(name, value * scale.to(value)[:, None, None])

    @torch.no_grad()
    def reset_geometry_(self) -> None:
        """M back to the identity, where it started. In place."""
        for name in ("geometry", "key_geometry"):
            if getattr(self, name) is not None:
                self.set_(name, torch.eye(self.head_dim))

    @property
    def scalable(self) -> bool:
        """Whether `scale_` has something to scale."""
        return self.geometry is not None or self.query_balance is not None


def feature_map(config: DarkConfig, **shape: Any) -> FeatureMap:
    """Makes the feature map of one layer: `feature_map(config, num_heads=9, num_kv_heads=3, head_dim=64)`.

    Keyword Args:
        num_heads, num_kv_heads, head_dim: the layer's H, G, d. layer: mixed into the seed (default 0). dtype: of what
            is learned (torch's default dtype).

    Raises:
        ConfigError: see `FeatureMap`.
    """
    return FeatureMap(config, **shape)
