"""Conversion of a model in place, and back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import ConversionError, DarkConfig
from ..features.maps import FeatureMap
from .added import offset_dtype
from .fingerprint import describe_base
from .interface import NAME, Observer, take_cache


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "layer_idx") and type(module).__name__.endswith(("Attention", "SelfAttention")):
            yield name, module


def _uses_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _is_sliding(module: Any) -> bool:
    for name in ("is_sliding", "sliding_window"):
        if hasattr(module, name):
            return bool(getattr(module, name))
    types = getattr(module.config, "layer_types", None)
    if types:
        return types[module.layer_idx] == "sliding_attention"
    return getattr(module.config, "sliding_window", None) is not None


def _why_not(model: Any, module: Any) -> str | None:
    """Why the attention of this module cannot be replaced, or None."""
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    if encoder_decoder or getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
        return (
            "belongs to a model with cross-attention, whose keys come from another sequence than its queries: a state "
            "that runs along one sequence does not apply. Convert decoder-only models and encoders."
        )
    if isinstance(getattr(module, "sinks", None), nn.Parameter):
        return "adds a learned sink to its softmax (gpt-oss), which the features cannot follow."
    if getattr(module, "kv_lora_rank", None) is not None:
        return "is latent attention (DeepSeek), whose keys and values are made by decompression: not supported."
    if getattr(module, "is_kv_shared_layer", False):
        return "takes keys and values from another layer's cache, which converted layers do not keep."
    return None


def check_convertible(model: nn.Module, config: DarkConfig) -> list[tuple[str, Any]]:
    """Attention modules this configuration converts, by name.

    Raises:
        ConversionError: nothing to convert, a module that does not go through transformers' attention interface, or
            a layer in `keep_exact` that would not be converted anyway.
    """
    found = list(_attention_modules(model))
    if not found:
        raise ConversionError(
            f"{type(model).__name__} has no attention module with a layer index: "
            "only transformers' decoders with attention layers can be converted."
        )
    for name, module in found:
        if reason := _why_not(model, module):
            raise ConversionError(f"{name} ({type(module).__name__}) {reason}")
        if not _uses_interface(module):
            raise ConversionError(
                f"{name} ({type(module).__name__}) does not use transformers' attention interface, "
                "so its attention cannot be replaced. Models built on that interface (Llama, Gemma, Qwen, …) can."
            )
    chosen = [(name, module) for name, module in found if config.convert_sliding or not _is_sliding(module)]
    if not chosen:
        raise ConversionError(
            f"all {len(found)} attention layers of {type(model).__name__} are sliding-window layers, linear already: "
            "set convert_sliding=True to convert them nevertheless."
        )
    present = sorted({module.layer_idx for _, module in chosen})
    if unknown := sorted(set(config.keep_exact) - set(present)):
        raise ConversionError(
            f"keep_exact names layer {', '.join(map(str, unknown))}, which this configuration does not convert: "
            f"choose from {', '.join(map(str, present))}."
        )
    return chosen


def _attach_all(chosen: list[tuple[str, Any]], config: DarkConfig) -> None:
    """Attaches feature maps; what `revert` goes back to is read first, because modules share a config."""
    for _, module in chosen:
        if (previous := module.config._attn_implementation) != NAME:
            module.__dict__["dark_previous"] = previous
    for _, module in chosen:
        if getattr(module, "dark", None) is None:
            _attach(module, config)


def _attach(module: Any, config: DarkConfig) -> None:
    heads = module.config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or module.config.hidden_size // heads
    feature_map = FeatureMap(
        config.at_layer(module.layer_idx),
        num_heads=heads,
        num_kv_heads=getattr(module.config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        layer=module.layer_idx,
        dtype=offset_dtype(module),
    )
    weight = next(module.parameters(), None)
    module.dark = feature_map if weight is None else feature_map.to(weight.device)
    module.__dict__["dark_hook"] = module.register_forward_pre_hook(take_cache, with_kwargs=True)
    module.config._attn_implementation = NAME
    module.config.darkformer = config.to_dict()


def converted_modules(model: nn.Module) -> list[Any]:
    """The attention modules that have a feature map, first layer first."""
    return [module for _, module in _attention_modules(model) if isinstance(getattr(module, "dark", None), FeatureMap)]


def dark_layers(model: nn.Module) -> Iterator[FeatureMap]:
    """The feature maps of a converted model, first layer first.

    Where an adapter of peft trains them (`modules_to_save=["dark"]`), the adapter's, not the frozen originals.
    """
    for name, module in model.named_modules():
        if isinstance(module, FeatureMap) and "original_module" not in name.split("."):
            yield module


def _warn_of_softcap(model: Any) -> None:
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None:
        warnings.warn(
            f"{type(model).__name__} caps its attention logits at {cap}: the exact window and sinks apply the cap, the "
            "features cannot.",
            UserWarning,
            stacklevel=4,
        )


def convert(model: PreTrainedModel, config: DarkConfig) -> PreTrainedModel:
    """Replaces the model's softmax attention by `config`'s, in place, and returns the model.

    Works on any decoder that calls transformers' attention interface. Layers that already attend through a sliding
    window stay as they are unless `config.convert_sliding`. The weights are not touched; `calibrate` and `finetune`
    come next.

    Raises:
        ConversionError: not a transformers model, converted already, or nothing in it can be converted.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"received {type(model).__name__}: convert takes a transformers PreTrainedModel.")
    if next(dark_layers(model), None) is not None:
        raise ConversionError(
            f"{type(model).__name__} is converted already: call darkformer.revert(model) before converting it again."
        )
    convert_from(model, config, describe_base(model))
    return model


def convert_from(model: PreTrainedModel, config: DarkConfig, base: dict[str, Any] | None) -> None:
    """`convert` for a model whose base is known: `base` is what `describe_base` says of it."""
    chosen = check_convertible(model, config)
    _attach_all(chosen, config)
    _warn_of_softcap(model)
    model.config.darkformer_base = base


def attach_saved(model: PreTrainedModel) -> None:
    """Gives a model under construction the feature maps its config speaks of; their weights are loaded afterwards."""
    config = DarkConfig.from_dict(dict(model.config.darkformer))
    _attach_all(check_convertible(model, config), config)


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Softmax attention again, in place: without training, bit-identical to the model before `convert`.

    Raises:
        ConversionError: the model is not converted.
    """
    converted = converted_modules(model)
    if not converted:
        raise ConversionError(f"{type(model).__name__} is not converted: there is nothing to revert.")
    for module in converted:
        module.__dict__.pop("dark_hook").remove()
        del module.dark
        module.config._attn_implementation = module.__dict__.pop("dark_previous", "sdpa")
        if hasattr(module.config, "darkformer"):
            del module.config.darkformer
    if hasattr(model.config, "darkformer_base"):
        del model.config.darkformer_base
    return model


@contextmanager
def observing(model: nn.Module, observer: Observer, *, softmax: bool = True) -> Iterator[None]:
    """Within the block every converted layer's q, k, v and output are shown to `observer`, without gradients.

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
    name = "dark_observer" if softmax else "dark_watcher"
    try:
        for module in modules:
            module.__dict__[name] = observer
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.__dict__.pop(name, None)
