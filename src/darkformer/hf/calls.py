"""One forward pass of a converted attention module: what it needs is passed as an argument, not kept on the module."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

#: Names of the cache argument in transformers' attention modules.
CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")


class AttentionCall:
    """One forward pass of an attention module, and the cache layer it has updated.

    Attributes:
        cache: the cache whose layer the module updates; None before it does.
        slot: that layer's number; None before.
    """

    def __init__(self) -> None:
        self.cache: Cache | None = None
        self.slot: int | None = None
        self._turns = 0

    def turn(self) -> int:
        """0 in the first attention of this forward pass, 1 in the second: differential attention has two."""
        self._turns += 1
        return self._turns - 1


class CallCache(Cache):
    """The cache that one forward pass of a converted module gets, with the layers of the original.

    `update` returns new keys and values instead of storing them, and notes the layer in the call: the attention
    function adds them to that layer's sums.
    """

    def __init__(self, cache: Cache, call: AttentionCall) -> None:
        self.layers, self._cache, self._call = cache.layers, cache, call

    def __getattr__(self, name: str) -> Any:
        if name == "_cache":  # not yet set while the object is being copied
            raise AttributeError(name)
        return getattr(self._cache, name)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values, as they are."""
        self._call.cache, self._call.slot = self._cache, layer_idx
        return key_states, value_states


class CallEncoderDecoderCache(EncoderDecoderCache):
    """The same for modules with separate caches for self-attention and cross-attention; the latter stays as it is."""

    def __init__(self, cache: EncoderDecoderCache, call: AttentionCall) -> None:
        self.self_attention_cache: Any = CallCache(cache.self_attention_cache, call)
        self.cross_attention_cache = cache.cross_attention_cache
        self.is_updated = cache.is_updated


def _wrapped(cache: Any, call: AttentionCall) -> Cache:
    return (CallEncoderDecoderCache if isinstance(cache, EncoderDecoderCache) else CallCache)(cache, call)


def with_call(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of a forward pass with a `CallCache` for its cache, and its `dark_call`; None without a cache."""
    call = AttentionCall()
    for name in CACHE_ARGUMENTS:
        if kwargs.get(name) is not None:
            return args, {**kwargs, name: _wrapped(kwargs[name], call), "dark_call": call}
    for place, value in enumerate(args):
        if isinstance(value, Cache):
            return (*args[:place], _wrapped(value, call), *args[place + 1 :]), {**kwargs, "dark_call": call}
    return None
