"""One forward pass of one converted attention module, passed along with it: nothing of a call lies on a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

#: Names that transformers' attention modules have for the argument that holds the cache.
CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")


class AttentionCall:
    """Which cache a forward pass of an attention module was given, and what it asked of it so far.

    Attributes:
        cache: the cache whose layer the module updates; None before it does.
        slot: that layer's number; None before.
    """

    def __init__(self) -> None:
        self.cache: Cache | None = None
        self.slot: int | None = None
        self._turns = 0

    def turn(self) -> int:
        """0 for the first attention of this forward pass, 1 for the second: differential attention has two."""
        self._turns += 1
        return self._turns - 1


class CallCache(Cache):
    """A cache as one forward pass of a converted module sees it: the same layers.

    `update` hands new keys and values through and notes for whom, instead of storing them: the attention function puts
    them into sums.
    """

    def __init__(self, cache: Cache, call: AttentionCall) -> None:
        self.layers, self._cache, self._call = cache.layers, cache, call

    def __getattr__(self, name: str) -> Any:
        if name == "_cache":  # an object that is being copied has none yet
            raise AttributeError(name)
        return getattr(self._cache, name)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values, as they are."""
        self._call.cache, self._call.slot = self._cache, layer_idx
        return key_states, value_states


class CallEncoderDecoderCache(EncoderDecoderCache):
    """The same for modules that keep self-attention and cross-attention apart; the latter stays as it is."""

    def __init__(self, cache: EncoderDecoderCache, call: AttentionCall) -> None:
        self.self_attention_cache: Any = CallCache(cache.self_attention_cache, call)
        self.cross_attention_cache = cache.cross_attention_cache
        self.is_updated = cache.is_updated


def _seen_by(cache: Any, call: AttentionCall) -> Cache:
    return (CallEncoderDecoderCache if isinstance(cache, EncoderDecoderCache) else CallCache)(cache, call)


def with_call(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pass's arguments with a `CallCache` for the cache and `dark_call` beside it; None without a cache."""
    for name in CACHE_ARGUMENTS:
        if kwargs.get(name) is not None:
            call = AttentionCall()
            return args, {**kwargs, name: _seen_by(kwargs[name], call), "dark_call": call}
    for place, value in enumerate(args):
        if isinstance(value, Cache):
            call = AttentionCall()
            return (*args[:place], _seen_by(value, call), *args[place + 1 :]), {**kwargs, "dark_call": call}
    return None
