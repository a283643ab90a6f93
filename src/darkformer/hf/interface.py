"""The attention function and the mask function, registered with transformers under the same name.

A custom attention without a mask function of exactly its name silently loses causality, so both are registered here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from ..config import ConversionError, NonFiniteError
from ..features.maps import FeatureMap
from ..ops.attention import attention, check_finite
from ..ops.exact import softmax_attention
from .cache import DarkCacheLayer, own_layer

NAME = "darkformer"
PACKED = (
    "the mask is neither causal nor padding (position_ids that restart, or a custom mask): converted layers "
    "cannot tell documents in one row apart. Put each document in a row of its own, with an attention_mask."
)
#: What a capture receives: the layer's feature map, q (B, H, L, d), k, v (B, G, L, d), the mask (B, L), s, the output.
Observer = Callable[[FeatureMap, Tensor, Tensor, Tensor, Tensor | None, float, Tensor], None]


def dark_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward pass: the 2-D padding mask (B, kv_length) or None for layers with full attention.

    Sliding-window layers that stay as they are get the mask that torch's attention needs.

    Raises:
        ConversionError: packed documents or any other pattern besides causal and padding.
    """
    converted = getattr(config, "darkformer", None) or {}
    if local_size is not None and not converted.get("convert_sliding", False):
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            local_size=local_size, **kwargs,
        )  # fmt: skip
    plain = mask_function in (causal_mask_function, bidirectional_mask_function) or local_size is not None
    if not plain:
        raise ConversionError(PACKED)
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:].bool()
        if attention_mask.shape[1] == kv_length and bool(attention_mask.all()):
            return None
    return attention_mask


def _allowed(mask: Tensor | None, length: int, keys: int, is_causal: bool, device: torch.device) -> Tensor | None:
    """(B or 1, L, K) for exact attention over `keys` keys of which the last `length` are the queries' own."""
    if mask is None and (length == keys or not is_causal):
        return None
    allowed = torch.ones(1, length, keys, dtype=torch.bool, device=device)
    if is_causal:
        allowed = allowed.tril(keys - length)
    return allowed if mask is None else allowed & mask[:, None, :]


@contextmanager
def _naming(feature_map: FeatureMap) -> Iterator[None]:
    """Puts the layer's number in front of what a NonFiniteError says."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"layer {feature_map.layer}: {error}") from error


def _check_restart(position_ids: Tensor | None, mask: Tensor | None) -> None:
    """Refuses packed documents: position_ids (B, L) that fall from one real token to the next.

    transformers looks for them only without a cache and without a mask; elsewhere they would mix silently.
    """
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return
    falls = position_ids.diff(dim=1) < 0
    if mask is not None:
        real = mask[:, -position_ids.shape[1] :].bool()
        falls = falls & real[:, 1:] & real[:, :-1]
    if bool(falls.any()):
        raise ConversionError(PACKED)


def _check_arguments(feature_map: FeatureMap, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuses what a converted layer cannot follow.

    Raises:
        ConversionError: masks that are not padding, packed documents, terms added to the logits besides q·k.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ConversionError(
            f"layer {feature_map.layer} got an attention mask of shape {tuple(attention_mask.shape)}: a converted "
            "layer takes padding masks (batch, tokens) only."
        )
    if extra := [name for name in ("s_aux", "softcap", "position_bias") if kwargs.get(name) is not None]:
        raise ConversionError(
            f"layer {feature_map.layer} is given {' and '.join(extra)}: learned sinks, soft-capped logits and position "
            "biases change the softmax in a way the features cannot follow, so this model cannot be converted."
        )
    _check_restart(kwargs.get("position_ids"), attention_mask)


def dark_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, L, d) after rotary embedding → (B, L, H, d_v).

    Modules without a feature map (sliding-window layers that stay) go to torch's softmax attention. Attention dropout
    is not applied at converted layers: there is no probability per key to drop.

    Raises:
        ConversionError: a 4-D mask at a converted layer. NonFiniteError: NaN or infinity, with the layer's number.
    """
    feature_map = getattr(module, "dark", None)
    if feature_map is None:
        if attention_mask is not None and attention_mask.dim() != 4:  # torch would broadcast it and lose causality
            raise ConversionError(
                f"{type(module).__name__} is not converted, but its config says so: another model that was converted "
                "shares the config object. Build each model from a copy of its own (copy.deepcopy(config))."
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    cache: DarkCacheLayer | None = module.__dict__.pop("dark_cache", None)
    _check_arguments(feature_map, attention_mask, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast the rotary embedding leaves queries and keys in float32 beside half-precision values.
    dtype, value = value.dtype, value.to(query.dtype)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    observer: Observer | None = module.__dict__.get("dark_observer")
    if feature_map.config.method == "exact" or observer is not None:
        allowed = _allowed(attention_mask, query.shape[2], key.shape[2], is_causal, query.device)
        output = softmax_attention(query, key, value, scaling=scaling, allowed=allowed, is_causal=is_causal)
        if observer is not None:  # statistics of NaN would be refused later, without the layer's name
            with _naming(feature_map):
                check_finite(query=query, key=key, value=value)
            observer(feature_map, query, key, value, attention_mask, scaling, output)
        return output.transpose(1, 2).to(dtype).contiguous(), None
    mask = None if attention_mask is None else attention_mask[:, -query.shape[2] :]
    with _naming(feature_map):
        result = attention(
            query, key, value, feature_map, scaling=scaling, key_mask=mask, is_causal=is_causal,
            initial_state=cache.state if cache else None, return_state=cache is not None,
        )  # fmt: skip
    if cache is None:
        assert isinstance(result, Tensor)
        output = result
    else:
        output, state = result
        cache.state = state.detach()
    return output.transpose(1, 2).to(dtype).contiguous(), None


def take_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a converted attention: puts our layer in the cache and hands it to `dark_attention`."""
    module.__dict__.pop("dark_cache", None)
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))  # the latter: GPT-NeoX
    if cache is not None and module.dark.config.method != "exact" and "dark_observer" not in module.__dict__:
        module.__dict__["dark_cache"] = own_layer(cache, module.layer_idx)


AttentionInterface.register(NAME, dark_attention)
AttentionMaskInterface.register(NAME, dark_mask)
