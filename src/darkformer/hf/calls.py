"""One forward pass of one converted attention module, passed along with it: nothing of a call lies on a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

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


class CallCache:
    """The cache as one forward pass of a converted module sees it.

    `update` hands new keys and values through and notes for whom, instead of storing them: the attention function puts
    them into sums. Everything else is the cache's own.
    """

    def __init__(self, cache: Any, call: AttentionCall) -> None:
        self.__dict__.update(_cache=cache, _call=call)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._cache)  # modules ask for the kind of cache

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["_cache"], name)
        return CallCache(found, self.__dict__["_call"]) if name == "self_attention_cache" else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cache, name, value)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values, as they are."""
        self._call.cache, self._call.slot = self._cache, layer_idx
        return key, value


def with_call(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pass's arguments with a `CallCache` for the cache and `dark_call` beside it; None without a cache."""
    for name in CACHE_ARGUMENTS:
        if kwargs.get(name) is not None:
            call = AttentionCall()
            return args, {**kwargs, name: CallCache(kwargs[name], call), "dark_call": call}
    for place, value in enumerate(args):
        if isinstance(value, Cache):
            call = AttentionCall()
            return (*args[:place], CallCache(value, call), *args[place + 1 :]), {**kwargs, "dark_call": call}
    return None
