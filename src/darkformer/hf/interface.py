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
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..config import ConversionError, NonFiniteError
from ..features.maps import FeatureMap
from ..ops.attention import attention, check_finite
from ..ops.exact import softmax_attention
from .cache import DarkCacheLayer, own_layer
from .masks import allowed_keys, check_stays, dark_mask, read_mask

NAME = "darkformer"
#: What a capture receives: the layer's feature map, q (B, H, L, d), k, v (B, G, L, d), the mask (B, L), s, the output.
Observer = Callable[[FeatureMap, Tensor, Tensor, Tensor, Tensor | None, float, Tensor], None]


@contextmanager
def _naming(feature_map: FeatureMap) -> Iterator[None]:
    """Puts the layer's number in front of what a NonFiniteError says."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"layer {feature_map.layer}: {error}") from error


def _check_arguments(module: Any, kwargs: dict[str, Any]) -> None:
    """Refuses what a converted layer cannot compute.

    Raises:
        ConversionError: terms added to the logits besides q·k, attention weights as an output.
    """
    layer = module.dark.layer
    if extra := [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ConversionError(
            f"layer {layer} is given {' and '.join(extra)}: learned sinks and position biases change the softmax in a "
            "way the features cannot follow, so this model cannot be converted."
        )
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ConversionError(
            f"layer {layer} is asked for output_attentions: linear attention forms no weight per pair of tokens. "
            "`darkformer diagnose` shows how far each head is from softmax; for the weights themselves use the "
            "softmax model: darkformer.revert(model), then model.set_attn_implementation('eager')."
        )


def _unconverted(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Sliding-window layers that stay: torch's softmax attention, with the model's soft cap if it has one."""
    if attention_mask is not None and attention_mask.dim() != 4:  # torch would broadcast it and lose causality
        raise ConversionError(
            f"{type(module).__name__} is not converted, but its config says so: another model that was converted "
            "shares the config object. Build each model from a copy of its own (copy.deepcopy(config))."
        )
    check_stays(attention_mask, kwargs, query.shape[0], query.shape[2])
    softcap = kwargs.pop("softcap", None)
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    length, keys = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True))
    allowed = None if attention_mask is None else attention_mask[:, 0]
    if allowed is None:
        allowed = allowed_keys(None, None, length, keys, causal, query.device)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = softmax_attention(
        query, key, value, scaling=scaling, allowed=allowed, is_causal=causal, softcap=softcap
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _exact(
    module: Any, query: Tensor, key: Tensor, value: Tensor, masks: tuple[Tensor | None, Tensor | None],
    scaling: float, is_causal: bool, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Softmax attention of a converted layer, shown to its observer if it has one."""
    mask, documents = masks
    feature_map, observer = module.dark, module.__dict__.get("dark_observer")
    allowed = allowed_keys(mask, documents, query.shape[2], key.shape[2], is_causal, query.device)
    output = softmax_attention(
        query, key, value, scaling=scaling, allowed=allowed, is_causal=is_causal, softcap=softcap
    )  # fmt: skip
    if observer is not None:
        if documents is not None:
            raise ConversionError("statistics are taken from rows of one document each: give no packed documents.")
        if not is_causal:
            raise ConversionError(
                f"layer {feature_map.layer} is bidirectional, an encoder's: calibrate and diagnose measure what a "
                "causal query sees, so their scales and biases would be wrong here. Finetune the encoder as "
                "darkformer.convert leaves it; untrained, DarkConfig(method='local') is nearer to softmax."
            )
        with _naming(feature_map):  # statistics of NaN would be refused later, without the layer's name
            check_finite(query=query, key=key, value=value)
        observer(feature_map, query, key, value, mask, scaling, output)
    return output


@torch.compiler.disable
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
    is not applied at converted layers: there is no probability per key to drop. `torch.compile` leaves it as it is.

    Raises:
        ConversionError: a mask, argument or cache that a converted layer cannot follow.
        NonFiniteError: NaN or infinity, with the layer's number.
    """
    feature_map = getattr(module, "dark", None)
    if feature_map is None:
        return _unconverted(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    cache: DarkCacheLayer | None = module.__dict__.pop("dark_cache", None)
    _check_arguments(module, kwargs)
    mask, documents = read_mask(attention_mask, kwargs, query.shape[0], query.shape[2], cache is not None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast the rotary embedding leaves queries and keys in float32 beside half-precision values.
    dtype, value = value.dtype, value.to(query.dtype)
    is_causal = kwargs.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    softcap: float | None = kwargs.get("softcap")
    if feature_map.config.method == "exact" or "dark_observer" in module.__dict__:
        output = _exact(module, query, key, value, (mask, documents), scaling, is_causal, softcap)
        return output.transpose(1, 2).to(dtype).contiguous(), None
    if cache is not None and mask is not None:
        cache.check_past(mask, query.shape[2])
    mask = None if mask is None else mask[:, -query.shape[2] :]
    options: dict[str, Any] = dict(scaling=scaling, is_causal=is_causal, softcap=softcap)
    with _naming(feature_map):
        if cache is not None:
            output = cache.extend(query, key, value, mask, feature_map, **options)
        else:
            alone = attention(query, key, value, feature_map, key_mask=mask, documents=documents, **options)
            assert isinstance(alone, Tensor)
            output = alone
    if (watcher := module.__dict__.get("dark_watcher")) is not None:
        watcher(feature_map, query, key, value, mask, scaling, output)
    return output.transpose(1, 2).to(dtype).contiguous(), None


@torch.compiler.disable
def take_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a converted attention: puts our layer in the cache and hands it to `dark_attention`.

    Raises:
        ConversionError: `set_attn_implementation` has turned softmax on under a converted model.
    """
    module.__dict__.pop("dark_cache", None)
    if (chosen := module.config._attn_implementation) != NAME:
        raise ConversionError(
            f"layer {module.dark.layer} is converted, but its attn_implementation was set to {chosen!r}: softmax would "
            f"be computed silently. Call darkformer.revert(model) first, or model.set_attn_implementation({NAME!r})."
        )
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))  # the latter: GPT-NeoX
    if cache is not None and module.dark.config.method != "exact" and "dark_observer" not in module.__dict__:
        module.__dict__["dark_cache"] = own_layer(cache, module)


AttentionInterface.register(NAME, dark_attention)
AttentionMaskInterface.register(NAME, dark_mask)
