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
from .cache import own_layer
from .calls import AttentionCall, with_call
from .layers import attachment_of, layer_of
from .masks import AttentionMask, allowed_keys, check_stays, dark_mask, read_mask
from .parts import Part, joined, parts_of

NAME = "darkformer"
#: What a capture receives: the layer's feature map, q (B, H, L, d), k, v (B, G, L, d), the mask (B, L), s, the output;
#: of a layer whose heads compute different things, the heads of its feature map alone.
Observer = Callable[[FeatureMap, Tensor, Tensor, Tensor, Tensor | None, float, Tensor], None]


@dataclass(frozen=True)
class Observation:
    """An observer of some layers, for what runs inside `observed` in the same thread.

    Attributes:
        layers: identities of their feature maps.
        softmax: these layers compute softmax attention meanwhile. False: what they are converted to.
    """

    observer: Observer
    layers: frozenset[int]
    softmax: bool


_OBSERVATION: ContextVar[Observation | None] = ContextVar("darkformer_observation", default=None)
#: What computes the attention of modules without a feature map inside `attending`, in the same thread.
_SUBSTITUTE: ContextVar[Callable[..., tuple[Tensor, Tensor | None]] | None] = ContextVar(
    "darkformer_substitute", default=None
)


@contextmanager
def observed(observation: Observation) -> Iterator[None]:
    """Within the block, and in this thread alone, the observation's layers show what they compute."""
    token = _OBSERVATION.set(observation)
    try:
        yield
    finally:
        _OBSERVATION.reset(token)


@contextmanager
def attending(substitute: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Within the block, and in this thread alone, `substitute` gets the calls of modules without a feature map."""
    token = _SUBSTITUTE.set(substitute)
    try:
        yield
    finally:
        _SUBSTITUTE.reset(token)


@dataclass(frozen=True)
class Received:
    """What reached the attention function in one call that a converted layer can follow."""

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
    """One call, checked for what a converted layer cannot compute.

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
    """Whether a call is causal, as the softmax attention that it replaces decides it.

    A mask that hides anything is a tensor there, and decides; without one torch's attention asks the module.
    """
    if isinstance(mask, AttentionMask) and (by_mask or mask.padding is not None or mask.documents is not None):
        assert mask.is_causal is not None  # else it is refused
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


def stays(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """A module that is not converted, under a config that says darkformer: the attention it had before.

    Where that is not known (another model's, which shares the config object), the eager one: it knows all that a family
    adds to its softmax.

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
    """Puts the layer's number in front of what a NonFiniteError says."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"layer {feature_map.layer}: {error}") from error


def _show_softmax(observer: Observer, feature_map: FeatureMap, received: Received, part: Part) -> Tensor:
    """Softmax attention of one call, of which `part`, the heads of the feature map, is shown to an observer."""
    output, padding = softmax_of(received)
    if isinstance(received.mask, AttentionMask) and received.mask.documents is not None:
        raise ConversionError("statistics are taken from rows of one document each: give no packed documents.")
    if not received.is_causal:
        raise ConversionError(
            f"layer {feature_map.layer} is bidirectional, an encoder's: calibrate and diagnose measure what a "
            "causal query sees, so their scales and biases would be wrong here. Finetune the encoder as "
            "darkformer.convert leaves it; untrained, DarkConfig(method='local') is nearer to softmax."
        )
    with _naming(feature_map):  # statistics of NaN would be refused later, without the layer's name
        check_finite(query=received.query, key=received.key, value=received.value)
    shown = part.of_queries(received.query), part.of_keys(received.key), part.of_keys(received.value)
    observer(feature_map, *shown, padding, received.scaling, part.of_queries(output))
    return output


def _observation(feature_map: FeatureMap) -> Observation | None:
    observation = _OBSERVATION.get()
    return observation if observation is not None and id(feature_map) in observation.layers else None


def _converted(
    feature_map: FeatureMap, query: Tensor, key: Tensor, value: Tensor, *, received: Received,
    call: AttentionCall | None, module: Any,
) -> Tensor:  # fmt: skip
    """What a converted layer computes, within the forward pass of its feature map: output (B, H, L, d_v)."""
    received = replace(received, query=query, key=key, value=value)
    observation = _observation(feature_map)
    parts = parts_of(layer_of(module), feature_map)
    if observation is not None and observation.softmax:
        return _show_softmax(observation.observer, feature_map, received, parts[0])
    if feature_map.config.method == "exact":
        return softmax_of(received)[0]
    length = query.shape[2]
    mask, documents = read_mask(received.mask, received.kwargs, query.shape[0], length, call is not None)
    options: dict[str, Any] = dict(
        scaling=received.scaling, is_causal=received.is_causal, softcap=received.softcap
    )  # fmt: skip
    with _naming(feature_map):
        if call is not None:
            output = own_layer(call, module, feature_map).extend(
                call.turn(), query, key, value, mask, parts, **options
            )  # fmt: skip
        else:
            if key.shape[2] != length:
                raise ConversionError(
                    f"layer {feature_map.layer} is given {key.shape[2]} keys for {length} queries, and no cache: keys "
                    "of another layer or another sequence cannot be followed."
                )
            outputs = [
                _alone(part, query, key, value, mask=mask, documents=documents, **options) for part in parts
            ]  # fmt: skip
            output = joined(parts, outputs)
    if observation is not None:
        mask, own = None if mask is None else mask[:, -length:], parts[0]
        shown = own.of_queries(query), own.of_keys(key), own.of_keys(value)
        observation.observer(feature_map, *shown, mask, received.scaling, own.of_queries(output))
    return output


def _alone(
    part: Part, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, documents: Tensor | None,
    scaling: float, is_causal: bool, softcap: float | None,
) -> Tensor:  # fmt: skip
    """A whole sequence of a layer without a cache: (B, H, L, d_v) of the heads of one part."""
    query, key, value = part.of_queries(query), part.of_keys(key), part.of_keys(value)
    options: dict[str, Any] = dict(scaling=scaling, is_causal=is_causal, softcap=softcap)
    if part.feature_map is None:
        allowed = allowed_keys(mask, documents, query.shape[2], key.shape[2], is_causal, query.device)
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
    Attention dropout is not applied at converted layers: there is no probability per key to drop. `torch.compile`
    leaves it as it is.

    Args:
        dark_call: this forward pass of a converted module, if it has a cache; `enter` passes it.

    Raises:
        ConversionError: a mask, argument or cache that a converted layer cannot follow.
        NonFiniteError: NaN or infinity, with the layer's number.
    """
    if "dark" not in module._modules:
        attend = _SUBSTITUTE.get() or stays
        return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    layer = layer_of(module)
    if isinstance(attention_mask, AttentionMask) and attention_mask.local is not None and not layer.local:
        raise ConversionError(
            f"layer {layer.layer} is told to see a {attention_mask.local} of the sequence and was converted as one "
            "that sees everything. Convert the model once its weights are loaded, so that a trial can tell."
        )
    received = receive(
        module, query, key, value, attention_mask, scaling, kwargs, causal_by_mask=layer.causal_by_mask
    )  # fmt: skip
    # Through the map's own forward pass: what loads or gathers its weights does so around that.
    run = partial(_converted, received=received, call=dark_call, module=module)
    output = module.dark(run, query, key, received.value)
    return output.transpose(1, 2).to(value.dtype).contiguous(), None


def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a converted attention: passes its call along with the cache, see `with_call`.

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
    # Nothing is observed while code is compiled, and the compiler does not follow context variables.
    observation = None if torch.compiler.is_compiling() else _observation(module.dark)
    return None if observation is not None and observation.softmax else with_call(module, args, kwargs)


AttentionInterface.register(NAME, dark_attention)
AttentionMaskInterface.register(NAME, dark_mask)
