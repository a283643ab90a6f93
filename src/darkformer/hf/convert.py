"""Conversion of a model in place, and back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import DarkConfig
from ..errors import ConfigError, ConversionError
from ..features.feature_map import FeatureMap
from .added import offset_dtype
from .fingerprint import check_description, describe_base
from .interface import NAME, enter
from .layers import (
    Layer,
    attach,
    attachment_of,
    config_of,
    converted_modules,
    dark_layers,
    detach,
    inner_names,
    layer_of,
)
from .plan import Plan, check_fits, check_names, plan_by_structure, plan_conversion, streaming_error
from .trial import note_previous, tolerance

_log = logging.getLogger("darkformer")


def _attach(model: nn.Module, plan: Plan, config: DarkConfig) -> None:
    """Gives the plan's modules their feature maps, after what `revert` restores has been noted."""
    note_previous(model)
    for _, module, layer in plan.layers:
        _set_map(module, layer, config)
        module.register_forward_pre_hook(enter, with_kwargs=True)
    for own in {id(module.config): module.config for _, module, _ in plan.layers}.values():
        own._attn_implementation = NAME
        own.darkformer = config.to_dict()
        own.darkformer_layers = [layer.to_dict() for _, module, layer in plan.layers if module.config is own]


def _device(module: Any) -> torch.device:
    """The device of a module's weights, or the one to which accelerate's hook moves them for a forward pass."""
    weight = next((x for x in module.parameters() if not x.is_meta), None)
    if weight is not None:
        return weight.device
    hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((x for x in devices if x is not None), "cpu"))


def _set_map(module: Any, layer: Layer, config: DarkConfig) -> FeatureMap:
    """Gives a module a new feature map for those heads that need one, and records what all of its heads compute."""
    parts = config.head_kinds(layer.layer, layer.num_kv_heads)
    heads = parts.features or parts.local or parts.exact
    with torch.inference_mode(False):  # tensors made in inference mode can never be trained
        feature_map = FeatureMap(
            config.at_layer(layer.layer, layer.num_kv_heads),
            num_heads=len(heads) * layer.group,
            num_kv_heads=len(heads),
            head_dim=layer.head_dim,
            layer=layer.layer,
            dtype=offset_dtype(module),
            heads=heads,
        )
        # A model under construction on the meta device gets its weights, and its device, later.
        building = torch.get_default_device().type == "meta"
        module.dark = feature_map if building else feature_map.to(_device(module))
        # transformers' mark: `init_weights` leaves alone what has numbers.
        feature_map._is_hf_initialized = not building  # type: ignore[assignment]
    exact = heads is parts.exact
    attach(module, layer=replace(layer, exact=exact, exact_heads=parts.exact, local_heads=parts.local))
    return feature_map


def drop_features(model: nn.Module, heads: Iterable[tuple[int, int]]) -> None:
    """Switches the features of some heads of a converted model off, in place: window and sinks remain.

    The features of these heads then cost neither time nor bytes; the other heads keep theirs as they are. Caches filled
    before are refused, and an optimizer has to be created again.

    Args:
        heads: (layer, key/value head) of each.

    Raises:
        ConversionError: the model is not converted, or not in that layer, or an adapter of peft has wrapped its maps.
            ConfigError: a head that its layer does not have, or whose window is 0.
    """
    names = tuple(f"{layer}.{head}" for layer, head in heads)
    modules = converted_modules(model)
    if not modules:
        raise ConversionError(
            f"{type(model).__name__} has no converted layer whose features could be dropped: convert it first, and "
            "drop them before an adapter of peft takes over its feature maps."
        )
    before = config_of(model)
    config = replace(before, no_features=(*before.no_features, *names))
    layers = list(map(layer_of, modules))
    check_names(config, layers)
    for module, layer in zip(modules, layers, strict=True):
        old, parts = module.dark, config.head_kinds(layer.layer, layer.num_kv_heads)
        if old.config.method in ("local", "exact") or parts.features == old.heads:
            old.config = config.at_layer(layer.layer, layer.num_kv_heads)
            continue
        new = _set_map(module, layer, config)
        if parts.features:
            _copy_heads(old, new)
        module.dark.train(old.training)
    for own in {id(module.config): module.config for module in modules}.values():
        own.darkformer = config.to_dict()


@torch.no_grad()
def _copy_heads(old: FeatureMap, new: FeatureMap) -> None:
    """Copies the tensors of the heads that `new` shares with `old`."""
    rows = torch.tensor([old.heads.index(head) for head in new.heads])
    sources = {**dict(old.named_buffers()), **dict(old.named_parameters())}
    for name, x in (*new.named_buffers(), *new.named_parameters()):
        x.copy_(sources[name].index_select(0, rows.to(sources[name].device)))
        x.requires_grad_(sources[name].requires_grad)


def _warn_of_softcap(model: Any) -> None:
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None:
        warnings.warn(
            f"{type(model).__name__} caps its attention logits at {cap}: the exact window and sinks apply the cap, the "
            "features cannot.",
            UserWarning,
            stacklevel=4,
        )


def convert(model: PreTrainedModel, config: DarkConfig, *, example: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Replaces the model's softmax attention by `config`'s, in place, and returns the model.

    Works on any decoder or encoder that calls transformers' attention interface. A trial forward pass on a dozen tokens
    shows which modules attend, with how many heads, under which mask and into which layer of the cache; if exact
    attention in their place would change the model's output, nothing is converted. Layers that already attend through
    a sliding window stay as they are unless `config.convert_sliding`; towers of other modalities and cross-attention
    always do. The logger `darkformer` says which modules were converted, and why others were not (INFO). The weights
    are not touched; `calibrate` and `finetune` come next. Your own forward hooks run in the trial's passes too.

    Args:
        example: keyword arguments for the model's forward pass, if it needs more than a few token ids (`input_ids`).
            Padding and the cache are not tried then.

    Raises:
        ConversionError: not a transformers model, converted already, nothing in it can be converted, or its attention
            is not followed exactly.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"received {type(model).__name__}: convert takes a transformers PreTrainedModel.")
    if next(dark_layers(model), None) is not None:
        raise ConversionError(
            f"{type(model).__name__} is converted already: call darkformer.revert(model) before converting it again."
        )
    plan = plan_conversion(model, config, example)
    convert_by(model, plan, config, describe_base(model))
    return model


def convert_by(model: PreTrainedModel, plan: Plan, config: DarkConfig, base: dict[str, Any] | None) -> None:
    """Converts by a plan. `base` is what `describe_base` returns for the model's weights.

    Raises:
        ConversionError: the converted model's output in steps differs from that in one piece.
    """
    _warn_of_softcap(model)
    try:
        _attach(model, plan, config)
        if config.method != "exact":  # which keeps the cache that the model had
            _check_streaming(model, plan, config)
    except BaseException as error:
        _revert(model)
        if isinstance(error, ConversionError | ConfigError) or not isinstance(error, Exception):
            raise
        raise ConversionError(
            f"{type(model).__name__} does not run once it is converted ({type(error).__name__}: {error})."
        ) from error
    for own in (model.config, *(module.config for _, module, _ in plan.layers)):
        own.darkformer_base = base
    _log.info("%s: %s", type(model).__name__, plan)


def _check_streaming(model: PreTrainedModel, plan: Plan, config: DarkConfig) -> None:
    """Compares a prompt and a step with the same tokens in one piece, after conversion.

    Some softmax models differ themselves, such as those whose quantization depends on the batch. The model is reverted
    to measure its own difference only where the converted one differs.
    """
    for run in (run for run in plan.runs if run.cached):
        if (error := streaming_error(plan.body, run)) <= tolerance(model):
            continue
        _revert(model)
        own = streaming_error(plan.body, run)
        _attach(model, plan, config)
        if error > 5 * own:
            raise ConversionError(
                f"{type(model).__name__} gives other numbers in steps than in one piece once it is converted (relative "
                f"difference {error:.1e}): its layers keep something of the past that converted layers do not follow."
            )
        _log.info("In steps the softmax model itself differs from one piece by %.1e (relative).", own)


def attach_saved(model: PreTrainedModel) -> None:
    """Gives a model under construction the feature maps that its config describes; their weights are loaded later.

    Raises:
        ConfigError: more features or a larger window than fit into memory. InputError: an altered config.
    """
    config = DarkConfig.from_dict(model.config.darkformer)
    described = getattr(model.config, "darkformer_layers", None)
    if described is None:  # saved by 0.1.0
        plan = plan_by_structure(model, config)
    else:
        by_name = {layer.name: layer for layer in map(Layer.from_dict, described)}
        plan = Plan([(name, m, by_name[short]) for name, short, m in inner_names(model) if short in by_name])
    check_fits(config, [layer for *_, layer in plan.layers])
    if (base := getattr(model.config, "darkformer_base", None)) is not None:
        check_description(base, "darkformer_base in config.json")
    waiting = [(name, module, layer) for name, module, layer in plan.layers if "dark" not in module._modules]
    if waiting:
        _attach(model, Plan(waiting), config)


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Softmax attention again, in place: without training, bit-identical to the model before `convert`.

    Raises:
        ConversionError: the model is not converted.
    """
    converted = converted_modules(model)
    if not converted and next(dark_layers(model), None) is not None:
        raise ConversionError(
            "an adapter of peft has wrapped the feature maps of this model: unload or merge it first "
            "(model.merge_and_unload())."
        )
    if not converted:
        raise ConversionError(f"{type(model).__name__} is not converted: there is nothing to revert.")
    _revert(model)
    return model


def _revert(model: PreTrainedModel) -> None:
    modules = converted_modules(model)
    for module in modules:
        for key, hook in list(module._forward_pre_hooks.items()):  # handles would not survive a copy of the model
            if hook is enter:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        del module.dark
        attachment = attachment_of(module)
        module.config._attn_implementation = "sdpa" if attachment is None else attachment.previous
    for config in {id(own): own for own in (model.config, *(module.config for module in modules))}.values():
        for name in ("darkformer", "darkformer_layers", "darkformer_base"):
            if name in vars(config):
                delattr(config, name)
    for module in model.modules():
        detach(module)
