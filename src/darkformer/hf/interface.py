"""The attention function and the mask function, registered with transformers under the same name.

A custom attention without a mask function of exactly its name silently loses causality, so both are registered here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..errors import ConversionError, NonFiniteError
from ..features.feature_map import FeatureMap
from ..ops.attention import attention, check_finite
from ..ops.exact import softmax_attention
from .cache import check_even, own_layer
from .calls import AttentionCall, with_call
from .layers import attachment_of, converted_modules, layer_of
from .masks import AttentionMask, allowed_keys, check_stays, dark_mask, read_mask
from .parts import Part, joined, parts_of

NAME = "darkformer"
#: Called with a layer's feature map, q (B, H, L, d), k, v (B, G, L, d), the mask (B, L), the scaling and the output; of
#: a layer whose heads compute different things, with the heads of its feature map alone.
Observer = Callable[[FeatureMap, Tensor, Tensor, Tensor, Tensor | None, float, Tensor], None]


@dataclass(frozen=True)
class _Observation:
    """An observer of some layers, in force inside `observing` in the same thread.

    Attributes:
        layers: identities of their feature maps.
        softmax: these layers compute softmax attention meanwhile. False: what they are converted to.
    """

    observer: Observer
    layers: frozenset[int]
    softmax: bool


_OBSERVATION: ContextVar[_Observation | None] = ContextVar("darkformer_observation", default=None)
#: Computes the attention of modules without a feature map inside `attending`, in the same thread.
_SUBSTITUTE: ContextVar[Callable[..., tuple[Tensor, Tensor | None]] | None] = ContextVar(
    "darkformer_substitute", default=None
)


@contextmanager
def observing(model: nn.Module, observer: Observer, *, softmax: bool) -> Iterator[None]:
    """Within the block `observer` gets every converted layer's q, k, v and output, without gradients.

    Only calls of the same thread are observed.

    Args:
        softmax: the model computes softmax attention meanwhile. False: what it is converted to.

    Raises:
        ConversionError: no layer is converted, or an adapter of peft has wrapped the feature maps.
    """
    modules = converted_modules(model)
    if not modules:
        raise ConversionError(
            f"{type(model).__name__} has no converted attention layer to observe: convert it first, and calibrate it "
            "before an adapter of peft takes over its feature maps."
        )
    token = _OBSERVATION.set(_Observation(observer, frozenset(id(module.dark) for module in modules), softmax))
    try:
        with torch.no_grad():
            yield
    finally:
        _OBSERVATION.reset(token)


@contextmanager
def attending(substitute: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Within the block `substitute` computes the attention of modules without a feature map, in this thread alone.

    It is called as transformers' attention functions are; their modules' config must name darkformer.
    """
    token = _SUBSTITUTE.set(substitute)
    try:
        yield
    finally:
        _SUBSTITUTE.reset(token)


@dataclass(frozen=True)
class Received:
    """The inputs of one call of the attention function, after `receive` has checked them."""

    query: Tensor  # (B, H, L, d)
    key: Tensor  # (B, G, K, d)
    value: Tensor  # (B, G, K, d_v), in the query's dtype
    mask: AttentionMask | Tensor | None
    kwargs: dict[str, Any]
    scaling: float
    softcap: float | None
    is_causal: bool


def receive(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | Tensor | None,
    scaling: float | None, kwargs: dict[str, Any], *, causal_by_mask: bool,
) -> Received:  # fmt: skip
    """Checks a call for what a converted layer cannot compute.

    Raises:
        ConversionError: terms added to the logits besides q·k, attention weights as an output.
    """
    name = f"layer {layer_of(module).layer}" if "dark" in module._modules else type(module).__name__
    if extra := [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ConversionError(
            f"{name} is given {' and '.join(extra)}: learned sinks and position biases change the softmax in a "
            "way the features cannot follow, so this model cannot be converted."
        )
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ConversionError(
            f"{name} is asked for output_attentions: linear attention forms no weight per pair of tokens. "
            "`darkformer diagnose` shows how far each head is from softmax; for the weights themselves use the "
            "softmax model: darkformer.revert(model), then model.set_attn_implementation('eager')."
        )
    return Received(
        query=query,
        key=key,
        # Under autocast the rotary embedding leaves queries and keys in float32 beside half-precision values.
        value=value.to(query.dtype),
        mask=mask,
        kwargs=kwargs,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        is_causal=_is_causal(module, causal_by_mask, mask, kwargs),
    )


def _is_causal(module: Any, by_mask: bool, mask: AttentionMask | Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether the softmax attention that a call replaces would be causal.

    Where anything is masked it gets a tensor, which decides. Without one torch's attention follows the module's flag.
    """
    if isinstance(mask, AttentionMask) and (by_mask or mask.padding is not None or mask.documents is not None):
        assert mask.is_causal is not None  # others are refused before
        return mask.is_causal
    flag = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if flag is None else flag)


def softmax_of(received: Received) -> tuple[Tensor, Tensor | None]:
    """Softmax attention under a mask that a converted layer can read: output (B, H, L, d_v) and padding (B, K)."""
    query, key, value = received.query, received.key, received.value
    if isinstance(received.mask, AttentionMask) and (filled := received.mask.filled(key.shape[2])) < key.shape[2]:
        key, value = key[:, :, :filled], value[:, :, :filled]
    padding, documents = read_mask(received.mask, received.kwargs, query.shape[0], query.shape[2], cached=False)
    allowed = allowed_keys(padding, documents, query.shape[2], key.shape[2], received.is_causal, query.device)
    output = softmax_attention(
        query, key, value, scaling=received.scaling, allowed=allowed, is_causal=received.is_causal,
        softcap=received.softcap,
    )  # fmt: skip
    return output, padding


def attend_as_before(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention that a module which is not converted had before its config named darkformer.

    Where that is not known (the module of another model that shares the config object) it is the family's eager
    attention, which has everything that the family adds to its softmax.

    Raises:
        ConversionError: documents by `cu_seq_lens_q` that it would mix.
    """
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attachment = attachment_of(module)
    previous = attachment.previous if attachment is not None else "sdpa" if eager is None else "eager"
    if isinstance(mask, AttentionMask):
        mask = mask.dense(previous)
    check_stays(mask, kwargs, query.shape[0], query.shape[2])
    function = ALL_ATTENTION_FUNCTIONS.get_interface(previous, eager)  # type: ignore[arg-type]
    return function(module, query, key, value, mask, **kwargs)


@contextmanager
def _naming(feature_map: FeatureMap) -> Iterator[None]:
    """Puts the layer's number in front of the message of a NonFiniteError."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"layer {feature_map.layer}: {error}") from error


def _observed_softmax(observer: Observer, feature_map: FeatureMap, received: Received, part: Part) -> Tensor:
    """Softmax attention of one call, whose `part`, the heads of the feature map, the observer gets."""
    output, padding = softmax_of(received)
    if isinstance(received.mask, AttentionMask) and received.mask.documents is not None:
        raise ConversionError("statistics are taken from rows of one document each: pass no packed documents.")
    if not received.is_causal:
        raise ConversionError(
            f"layer {feature_map.layer} is bidirectional, an encoder's: calibrate and diagnose measure what a "
            "causal query sees, so their scales and biases would be wrong here. Finetune the encoder as "
            "darkformer.convert leaves it; untrained, DarkConfig(method='local') is nearer to softmax."
        )
    with _naming(feature_map):  # later the statistics would be refused, without the layer's number
        check_finite(query=received.query, key=received.key, value=received.value)
    inputs = part.of_queries(received.query), part.of_keys(received.key), part.of_keys(received.value)
    observer(feature_map, *inputs, padding, received.scaling, part.of_queries(output))
    return output


def _observation(feature_map: FeatureMap) -> _Observation | None:
    observation = _OBSERVATION.get()
    return observation if observation is not None and id(feature_map) in observation.layers else None


def _converted(
    feature_map: FeatureMap, query: Tensor, key: Tensor, value: Tensor, *, received: Received,
    call: AttentionCall | None, module: Any,
) -> Tensor:  # fmt: skip
    """The output (B, H, L, d_v) of a converted layer, within the forward pass of its feature map."""
    received = replace(received, query=query, key=key, value=value)
    observation = _observation(feature_map)
    layer = layer_of(module)
    parts = parts_of(layer, feature_map)
    if observation is not None and observation.softmax:
        return _observed_softmax(observation.observer, feature_map, received, parts[0])
    if feature_map.config.method == "exact":
        return softmax_of(received)[0]
    length = query.shape[2]
    mask, documents = read_mask(received.mask, received.kwargs, query.shape[0], length, call is not None)
    options: dict[str, Any] = dict(scaling=received.scaling, is_causal=received.is_causal, softcap=received.softcap)
    with _naming(feature_map):
        if call is not None:
            turn, own = call.turn(), own_layer(call, module, feature_map)
            if turn == 0:
                assert call.cache is not None  # own_layer refuses calls without
                check_even(call.cache, own, length, module.config)
            output = own.extend(turn, layer.calls, query, key, value, mask, parts, **options)
        elif key.shape[2] == length:
            outputs = [_of_part(part, query, key, value, mask, documents, **options) for part in parts]
            output = joined(parts, outputs)
        else:
            raise ConversionError(
                f"layer {feature_map.layer} receives {key.shape[2]} keys for {length} queries, and no cache: keys "
                "of another layer or another sequence cannot be followed."
            )
    if observation is not None:
        mask, part = None if mask is None else mask[:, -length:], parts[0]
        inputs = part.of_queries(query), part.of_keys(key), part.of_keys(value)
        observation.observer(feature_map, *inputs, mask, received.scaling, part.of_queries(output))
    return output


def _of_part(
    part: Part, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, documents: Tensor | None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The output (B, H of the part, L, d_v) of some heads for a whole sequence without a cache."""
    query, key, value = part.of_queries(query), part.of_keys(key), part.of_keys(value)
    if part.feature_map is None:
        allowed = allowed_keys(mask, documents, query.shape[2], key.shape[2], options["is_causal"], query.device)
        return softmax_attention(query, key, value, allowed=allowed, **options)
    output = attention(query, key, value, part.feature_map, key_mask=mask, documents=documents, **options)
    assert isinstance(output, Tensor)
    return output


@torch.compiler.disable
def dark_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    dark_call: AttentionCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query (B, H, L, d) after rotary embedding → (B, L, H, d_v).

    Modules without a feature map (sliding-window layers that stay, cross-attention) keep the attention they had.
    Attention dropout is not applied at converted layers: there is no probability per key to drop. `torch.compile` does
    not trace into this function.

    Args:
        dark_call: this forward pass of a converted module, if it has a cache; `enter` passes it.

    Raises:
        ConversionError: a mask, argument or cache that a converted layer cannot follow.
        NonFiniteError: NaN or infinity, with the layer's number.
    """
    if "dark" not in module._modules:
        attend = _SUBSTITUTE.get() or attend_as_before
        return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    layer = layer_of(module)
    if isinstance(attention_mask, AttentionMask) and attention_mask.sliding is not None and not layer.sliding:
        raise ConversionError(
            f"layer {layer.layer} is to see a {attention_mask.sliding} of the sequence, but was converted as one that "
            "sees everything. Convert the model once its weights are loaded, so that the trial shows it."
        )
    received = receive(
        module, query, key, value, attention_mask, scaling, kwargs, causal_by_mask=layer.causal_by_mask
    )  # fmt: skip
    # Through the map's own forward pass, as hooks that load or gather its weights (accelerate, FSDP) run around that.
    run = partial(_converted, received=received, call=dark_call, module=module)
    output = module.dark(run, query, key, received.value)
    return output.transpose(1, 2).to(value.dtype).contiguous(), None


def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a converted attention module: adds the `AttentionCall` to its arguments, see `with_call`.

    Raises:
        ConversionError: `set_attn_implementation` has turned softmax on under a converted model.
    """
    layer = layer_of(module)
    if (chosen := module.config._attn_implementation) != NAME:
        raise ConversionError(
            f"layer {layer.layer} is converted, but its attn_implementation was set to {chosen!r}: softmax would "
            f"be computed silently. Call darkformer.revert(model) first, or model.set_attn_implementation({NAME!r})."
        )
    if layer.exact:
        return None
    # The compiler does not follow context variables, and nothing is observed while it runs.
    observation = None if torch.compiler.is_compiling() else _observation(module.dark)
    return None if observation is not None and observation.softmax else with_call(module, args, kwargs)


AttentionInterface.register(NAME, dark_attention)
AttentionMaskInterface.register(NAME, dark_mask)
