"""What identifies the model a conversion started from: its name and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..features.maps import FeatureMap

#: Elements hashed at a time, so that a half-precision model is never held in float32 as a whole.
_CHUNK = 1 << 24


def split_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the model's own tensors, what conversion added) of its state dict, each by its full name; nothing is copied."""
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FeatureMap))
    own: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        (added if name.startswith(prefixes) else own)[name] = tensor
    return own, added


def digest(tensors: Mapping[str, Tensor], *, values: bool = False) -> str:
    """SHA-256 over names, shapes and numbers, in the order of the names.

    Args:
        values: floating-point tensors count by their float32 values, so that the same numbers stored in bfloat16 and in
            float32 agree; otherwise dtype and bytes count as they are.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        kind = "float" if values and tensor.is_floating_point() else str(tensor.dtype)
        total.update(f"{name} {kind} {tuple(tensor.shape)}\n".encode())
        for part in tensor.contiguous().flatten().split(_CHUNK):
            part = part.float() if kind == "float" else part
            total.update(part.cpu().view(torch.uint8).numpy())
    return total.hexdigest()


def describe_base(model: nn.Module) -> dict[str, Any] | None:
    """Name, dtype and fingerprint of the model's own weights; None while they are not there (meta device).

    One pass over the weights: 1 to 2 GB a second on a CPU with SHA instructions. It cannot wait until something is
    saved, because nothing cheaper tells whether the weights are still those that were converted: what writes through
    `.data` (peft's merge does) leaves the tensor, its memory and its version counter as they were.
    """
    own, _ = split_tensors(model)
    if any(tensor.is_meta for tensor in own.values()):
        return None
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    if Path(name).exists():  # a folder of this machine: its name says enough, and is saved with the model
        name = Path(name).name
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "fingerprint": digest(own, values=True)}
