"""The tensors that conversion added to a model, by name, and the model's own without them.

The names are those of version 0.1.0, whose files must load: `…dark.geometry` is M, the start and the learned offset
together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, NonFiniteError
from ..features.feature_map import LEARNED, FeatureMap

#: Dtypes of offsets; a quantized model's weights may have another one.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: The names of offsets in a state dict, as a regular expression.
OFFSETS = rf"\.dark\.({'|'.join(LEARNED)})_offset$"


def offset_dtype(module: nn.Module) -> torch.dtype:
    """The floating-point dtype of a module's weights, which its offsets have as well."""
    return next((p.dtype for p in module.parameters() if p.dtype in DTYPES), torch.float32)


def read(model: nn.Module, name: str) -> Tensor | None:
    """A tensor of the model by its full name, also if accelerate has offloaded it (`cpu_offload`, `device_map`).

    Raises:
        InputError: there is none (meta device).
    """
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    x: Tensor | None = getattr(module, own)
    if x is None or not x.is_meta:
        return x
    while True:  # the hook may be on the module itself or on one around it
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
    """Every feature map by its name, including the originals behind an adapter of peft."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FeatureMap))


def added_values(model: nn.Module) -> dict[str, Tensor]:
    """The values that the feature maps compute with, by full name. Those without a learned part are not copied.

    Raises:
        InputError: there are none (meta device).
    """
    added = {}
    for name, fm in feature_maps(model):
        values = fm.values(lambda own, prefix=name: read(model, f"{prefix}.{own}"))  # type: ignore[misc]
        added.update({f"{name}.{own}": x for own, x in values.items()})
    return added


def set_added(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Sets what `added_values` returned, in place."""
    for name, value in values.items():
        path, _, own = name.rpartition(".")
        fm = model.get_submodule(path)
        assert isinstance(fm, FeatureMap)
        fm.set_(own, value)


def check_finite(values: dict[str, Tensor], source: object) -> None:
    """Refuses values of feature maps with NaN or infinity.

    Raises:
        NonFiniteError: names the first of them, and the `source` that they were read from.
    """
    if bad := [name for name, x in values.items() if not bool(x.isfinite().all())]:
        raise NonFiniteError(
            f"{source}: {len(bad)} tensors of feature maps ({', '.join(bad[:3])}, …) hold NaN or infinity: training "
            "had diverged when they were saved, or the file is damaged. Go back to an earlier one."
        )


@torch.no_grad()
def initialize_(fm: FeatureMap) -> None:
    """Gives a feature map's tensors the values of its construction, but for those that a checkpoint has filled.

    What transformers asks of `_init_weights`; it marks the tensors that are loaded.
    """
    tensors = dict((*fm.named_parameters(recurse=False), *fm.named_buffers(recurse=False)))
    waiting = {name: x for name, x in tensors.items() if not (x.is_meta or getattr(x, "_is_hf_initialized", False))}
    if not waiting:
        return
    with torch.device("cpu"):
        new = FeatureMap(
            fm.config, num_heads=fm.num_heads, num_kv_heads=fm.num_kv_heads, head_dim=fm.head_dim, layer=fm.layer,
            heads=fm.heads,
        )  # fmt: skip
    for name, x in waiting.items():
        x.copy_(getattr(new, name))


def own_entries(model: nn.Module) -> dict[str, Any]:
    """The entries of the state dict that conversion did not add, by name; nothing is copied."""
    prefixes = tuple(f"{name}." for name, _ in feature_maps(model))
    return {name: x for name, x in model.state_dict().items() if not name.startswith(prefixes)}


def left_out(model: nn.Module, missing: set[str]) -> set[str]:
    """The offsets that a checkpoint lacks because its version had none: all of them, or the empty set."""
    offsets = {f"{name}.{own}" for name, fm in feature_maps(model) for own, _ in fm.named_parameters(recurse=False)}
    return offsets if offsets <= missing else set()


@torch.no_grad()
def settle_offsets(model: nn.Module, absent: set[str], *, offloaded: bool) -> None:
    """Completes the loading of a checkpoint into float32 offsets: zeros for `absent` ones, and the model's dtype.

    Args:
        offloaded: weights on the meta device are in files, whose dtype must stay.
    """
    for name in absent:
        model.get_parameter(name).zero_()
    for module in model.modules():
        fm, dtype = getattr(module, "dark", None), offset_dtype(module)
        if not isinstance(fm, FeatureMap) or dtype.itemsize > 2:
            continue
        if not (offloaded and any(p.is_meta for p in fm.parameters())):
            fm.to(dtype)
