"""The converted layers of a model: what `convert` learned about each, where that is kept, and how to walk over them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import DarkConfig
from ..errors import ConversionError
from ..features.feature_map import FeatureMap


@dataclasses.dataclass(frozen=True)
class Layer:
    """What `convert` found out about one attention module; none of it changes from call to call.

    Attributes:
        name: of the module inside its innermost `PreTrainedModel`, so that it is the same with and without a head.
        layer: its number, for messages and for the seed of its draws.
        slots: layers of the cache that it fills; several where several layers of a model share one attention module.
        num_heads, num_kv_heads, head_dim: of the queries and keys that reach the attention function.
        calls: how often one forward pass of the module attends (twice in differential attention).
        sliding: whether the softmax it replaces is limited to a window or chunk (`convert_sliding`).
        exact: whether all its heads compute softmax attention (`keep_exact`, method `exact`), with the cache it had.
        causal_by_mask: causality follows the mask function even without padding, as in eager attention; False: then
            the module's flag decides, as in torch's and flash attention.
        exact_heads, local_heads: key/value heads that keep softmax, and those with window and sinks alone; they follow
            from the configuration.
    """

    name: str
    layer: int
    slots: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    calls: int = 1
    sliding: bool = False
    exact: bool = False
    causal_by_mask: bool = False
    exact_heads: tuple[int, ...] = ()
    local_heads: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        """Query heads of each key/value head."""
        return self.num_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json, without what the configuration says."""
        values = {**dataclasses.asdict(self), "slots": list(self.slots)}
        values["local"] = values.pop("sliding")  # its name in files
        return {name: x for name, x in values.items() if name not in ("exact_heads", "local_heads")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layer:
        """Inverse of `to_dict`."""
        values = {"sliding" if name == "local" else name: x for name, x in values.items()}
        return cls(**{**values, "slots": tuple(values["slots"])})


@dataclasses.dataclass(frozen=True)
class Attachment:
    """What darkformer keeps on an attention module, beside the feature map of a converted one (`module.dark`).

    Every module that attends under a config whose `_attn_implementation` is darkformer has one, in the attribute
    `_darkformer`; copies and pickles of the module take it along. Only the functions of this file touch it.

    Attributes:
        previous: the attn_implementation of the module's config before. A module that stays goes on with it, and
            `revert` restores it.
        layer: of a converted module; None for one that stays.
    """

    previous: str
    layer: Layer | None = None


def attachment_of(module: nn.Module) -> Attachment | None:
    """The module's `Attachment`, None if it has none. Wrappers that forward attributes do not count."""
    return module.__dict__.get("_darkformer")


def layer_of(module: nn.Module) -> Layer:
    """What is known of a converted attention module."""
    attachment = attachment_of(module)
    assert attachment is not None and attachment.layer is not None, "not a converted attention module"
    return attachment.layer


def attach(module: Any, *, previous: str | None = None, layer: Layer | None = None) -> None:
    """Sets fields of the module's `Attachment`; those that are not passed keep their values."""
    before = attachment_of(module) or Attachment("sdpa")
    module._darkformer = Attachment(previous or before.previous, layer or before.layer)


def detach(module: Any) -> None:
    """Removes the module's `Attachment`, if it has one."""
    module.__dict__.pop("_darkformer", None)


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's forward pass calls transformers' attention interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def inner_names(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(full name, name inside the innermost `PreTrainedModel`, module) of every module, in the order of the model."""
    owners = {""} | {name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for name, module in model.named_modules():
        parent = name
        while parent not in owners:
            parent = parent.rpartition(".")[0]
        yield name, name[len(parent) :].removeprefix(".") if parent != name else "", module


def converted_modules(model: nn.Module) -> list[Any]:
    """The attention modules that have a feature map, first layer first."""
    return [m for m in model.modules() if isinstance(getattr(m, "dark", None), FeatureMap)]


def config_of(model: nn.Module) -> DarkConfig:
    """The configuration a model was converted with; that of a single feature map is `DarkConfig.at_layer` of it."""
    module: Any = next(m for m in model.modules() if (a := attachment_of(m)) is not None and a.layer is not None)
    return DarkConfig.from_dict(dict(module.config.darkformer))


def map_of(module: Any) -> FeatureMap:
    """The feature map of a converted module, also where an adapter of peft has wrapped it."""
    return module.dark if isinstance(module.dark, FeatureMap) else next(dark_layers(module.dark))


def dark_layers(model: nn.Module) -> Iterator[FeatureMap]:
    """The feature maps of a converted model, first layer first.

    Where an adapter of peft trains them (`modules_to_save=["dark"]`), the adapter's, not the frozen originals.
    """
    for name, module in model.named_modules():
        if isinstance(module, FeatureMap) and "original_module" not in name.split("."):
            yield module


def required_maps(model: nn.Module) -> list[FeatureMap]:
    """All `dark_layers`.

    Raises:
        ConversionError: there are none.
    """
    maps = list(dark_layers(model))
    if not maps:
        raise ConversionError("the model is not converted: call darkformer.convert(model, config) first.")
    return maps
