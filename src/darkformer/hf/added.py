"""What conversion added to a model: its values under their own names, apart from the model's own weights.

The names are those of version 0.1.0, whose files go on being read: `…dark.geometry` is M whatever part of it is start
and what part was learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..features.feature_map import LEARNED, FeatureMap

#: What offsets may be kept in; a quantized model's weights may be of no such dtype.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: The names of offsets in a state dict, as a regular expression.
OFFSETS = rf"\.dark\.({'|'.join(LEARNED)})_offset$"


def offset_dtype(module: nn.Module) -> torch.dtype:
    """The floating-point dtype of a module's weights, which what is learned beside them has as well."""
    return next((p.dtype for p in module.parameters() if p.dtype in DTYPES), torch.float32)


def read(model: nn.Module, name: str) -> Tensor | None:
    """A tensor of the model by its full name, from where accelerate keeps it (`cpu_offload`, `device_map`) if it does.

    Raises:
        InputError: it is nowhere (meta device).
    """
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    x: Tensor | None = getattr(module, own)
    if x is None or not x.is_meta:
        return x
    while True:  # the module itself, or one around it whose hook places what is inside
        hook = getattr(module, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            weights = getattr(one, "weights_map", None)
            with suppress(KeyError, TypeError):  # TypeError: None, a hook without weights
                return weights[own]  # type: ignore[index]
        if not path:
            raise InputError("the model has no weights (meta device): load them first.")
        path, _, last = path.rpartition(".")
        module, own = model.get_submodule(path), f"{last}.{own}"


def feature_maps(model: nn.Module) -> Iterator[tuple[str, FeatureMap]]:
    """Every feature map by its name, those that an adapter of peft has put aside too."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FeatureMap))


def added_values(model: nn.Module) -> dict[str, Tensor]:
    """What the feature maps compute with, by full name; nothing that was not learned is copied.

    Raises:
        InputError: it is not there (meta device).
    """
    found = {}
    for name, fm in feature_maps(model):
        values = fm.values(lambda own, prefix=name: read(model, f"{prefix}.{own}"))  # type: ignore[misc]
        found.update({f"{name}.{own}": x for own, x in values.items()})
    return found


def set_added(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Writes what `added_values` gave. In place."""
    for name, value in values.items():
        path, _, own = name.rpartition(".")
        fm = model.get_submodule(path)
        assert isinstance(fm, FeatureMap)
        fm.set_(own, value)


def own_entries(model: nn.Module) -> dict[str, Any]:
    """The model's own entries of its state dict: tensors, and whatever quantization keeps there; nothing is copied."""
    prefixes = tuple(f"{name}." for name, _ in feature_maps(model))
    return {name: x for name, x in model.state_dict().items() if not name.startswith(prefixes)}


def left_out(model: nn.Module, missing: set[str]) -> set[str]:
    """The offsets a checkpoint lacks because it was written before there were any, and so has none at all."""
    offsets = {f"{name}.{own}" for name, fm in feature_maps(model) for own, _ in fm.named_parameters(recurse=False)}
    return offsets if offsets <= missing else set()


@torch.no_grad()
def settle_offsets(model: nn.Module, absent: set[str], *, offloaded: bool) -> None:
    """After a checkpoint was read into float32 offsets: zeros for `absent` ones, and the dtype of the model for all.

    Args:
        offloaded: weights on the meta device lie in files in the dtype they have, so this must stay.
    """
    for name in absent:
        model.get_parameter(name).zero_()
    for module in model.modules():
        fm, dtype = getattr(module, "dark", None), offset_dtype(module)
        if not isinstance(fm, FeatureMap) or dtype.itemsize > 2:
            continue
        if not (offloaded and any(p.is_meta for p in fm.parameters())):
            fm.to(dtype)
