"""Conversion of a model in place, and back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import DarkConfig
from ..errors import ConversionError
from ..features.feature_map import FeatureMap
from .added import offset_dtype
from .fingerprint import describe_base
from .interface import NAME, Observation, Observer, enter, observed
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
from .plan import Plan, check_names, plan_by_structure, plan_conversion, streaming_gap
from .trial import note_previous, tolerance

__all__ = [
    "Plan", "convert", "converted_modules", "dark_layers", "drop_features", "observing", "plan_conversion", "revert",
]  # fmt: skip

_log = logging.getLogger("darkformer")


def _attach(model: nn.Module, plan: Plan, config: DarkConfig) -> None:
    """Gives the plan's modules their feature maps; what `revert` goes back to is noted first."""
    note_previous(model)
    for _, module, layer in plan.layers:
        _set_map(module, layer, config)
        module.register_forward_pre_hook(enter, with_kwargs=True)
    for own in {id(module.config): module.config for _, module, _ in plan.layers}.values():
        own._attn_implementation = NAME
        own.darkformer = config.to_dict()
        own.darkformer_layers = [layer.to_dict() for _, module, layer in plan.layers if module.config is own]


def _device(module: Any) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate's hook brings them for a forward pass."""
    weight = next((x for x in module.parameters() if not x.is_meta), None)
    if weight is not None:
        return weight.device
    hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((x for x in devices if x is not None), "cpu"))


def _set_map(module: Any, layer: Layer, config: DarkConfig) -> FeatureMap:
    """A new feature map for those heads of a module that have one, and the record of what all of them compute."""
    parts = config.parts_of(layer.layer, layer.num_kv_heads)
    heads = parts.features or parts.local or parts.exact
    with torch.inference_mode(False):  # whose tensors would never learn
        feature_map = FeatureMap(
            config.at_layer(layer.layer, layer.num_kv_heads),
            num_heads=len(heads) * layer.group,
            num_kv_heads=len(heads),
            head_dim=layer.head_dim,
            layer=layer.layer,
            dtype=offset_dtype(module),
            heads=heads,
        )
        # On the meta device weights will be loaded, and moved with the model's own.
        building = torch.get_default_device().type == "meta"
        module.dark = feature_map if building else feature_map.to(_device(module))
    exact = heads is parts.exact
    attach(module, layer=replace(layer, exact=exact, exact_heads=parts.exact, local_heads=parts.local))
    return feature_map


def drop_features(model: nn.Module, heads: Iterable[tuple[int, int]]) -> None:
    """Switches features off in some heads of a converted model, in place: window and sinks alone stay there.

    These heads then cost no features, in time or bytes, and what the others have is as it was. Caches filled before
    are refused, and an optimizer has to be made anew.

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
        old, parts = module.dark, config.parts_of(layer.layer, layer.num_kv_heads)
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
    """What `old` has of the heads of `new`."""
    rows = torch.tensor([old.heads.index(head) for head in new.heads])
    tables = ((old._buffers, new._buffers), (old._parameters, new._parameters))
    for theirs, ours in tables:
        for name, x in ours.items():
            if x is not None:
                source = theirs[name]
                assert source is not None
                x.copy_(source.index_select(0, rows.to(source.device)))
                x.requires_grad_(source.requires_grad)


def _detach(module: Any) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is enter:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    del module.dark


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
    shows which modules attend, with how many heads, under which mask and into which layer of the cache; where exact
    attention in their place would not give the original's output, nothing is changed. Layers that already attend
    through a sliding window stay as they are unless `config.convert_sliding`; towers of other modalities and
    cross-attention always do. What was converted and what was left, and why, goes to the log of `darkformer` (INFO).
    The weights are not touched; `calibrate` and `finetune` come next. Forward hooks of yours see the trial's passes.

    Args:
        example: keyword arguments for the model's forward pass, where a few token ids (`input_ids`) do not do. Padding
            and the cache are not tried then.

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
    """`convert` by a plan, for a model whose base is known: `base` is what `describe_base` says of it.

    Raises:
        ConversionError: the converted model does not give in steps what it gives in one piece.
    """
    _attach(model, plan, config)
    _warn_of_softcap(model)
    try:
        if config.method != "exact":  # which keeps the cache that the model had
            _check_streaming(model, plan, config)
    except BaseException as error:
        revert(model)
        if isinstance(error, ConversionError) or not isinstance(error, Exception):
            raise
        raise ConversionError(
            f"{type(model).__name__} does not run once it is converted ({type(error).__name__}: {error})."
        ) from error
    for own in (model.config, *(module.config for _, module, _ in plan.layers)):
        own.darkformer_base = base
    _log.info("%s: %s", type(model).__name__, plan)


def _check_streaming(model: PreTrainedModel, plan: Plan, config: DarkConfig) -> None:
    """Compares a prompt and a step with the same tokens in one piece, after conversion.

    Some models differ by themselves: those that quantize by what is in the batch. Only where the converted one differs
    is it reverted, for a look at the softmax model's own difference.
    """
    for run in (run for run in plan.runs if run.cached):
        if (gap := streaming_gap(plan.body, run)) <= tolerance(model):
            continue
        _revert(model)
        own = streaming_gap(plan.body, run)
        _attach(model, plan, config)
        if gap > 5 * own:
            raise ConversionError(
                f"{type(model).__name__} gives other numbers in steps than in one piece once it is converted (relative "
                f"difference {gap:.1e}): its layers keep something of the past that converted layers do not follow."
            )
        _log.info("In steps the softmax model itself differs from one piece by %.1e (relative).", own)


def attach_saved(model: PreTrainedModel) -> None:
    """Gives a model under construction the feature maps its config speaks of; their weights are loaded afterwards."""
    config = DarkConfig.from_dict(dict(model.config.darkformer))
    described = getattr(model.config, "darkformer_layers", None)
    if described is None:  # saved by 0.1.0
        plan = plan_by_structure(model, config)
    else:
        by_name = {layer.name: layer for layer in map(Layer.from_dict, described)}
        plan = Plan([(name, m, by_name[short]) for name, short, m in inner_names(model) if short in by_name])
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
    """`revert` of a model that is converted."""
    modules = converted_modules(model)
    for module in modules:
        _detach(module)
        attachment = attachment_of(module)
        module.config._attn_implementation = "sdpa" if attachment is None else attachment.previous
    for config in {id(own): own for own in (model.config, *(module.config for module in modules))}.values():
        for name in ("darkformer", "darkformer_layers", "darkformer_base"):
            if name in vars(config):
                delattr(config, name)
    for module in model.modules():
        detach(module)


@contextmanager
def observing(model: nn.Module, observer: Observer, *, softmax: bool = True) -> Iterator[None]:
    """Within the block every converted layer's q, k, v and output are shown to `observer`, without gradients.

    Only what the same thread runs is shown.

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
    layers = frozenset(id(module.dark) for module in modules)
    with observed(Observation(observer, layers, softmax)), torch.no_grad():
        yield
