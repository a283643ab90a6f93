"""What identifies the model a conversion started from: its name and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .added import own_entries, read

#: Elements hashed at a time, so that a half-precision model is never held in float32 as a whole.
_CHUNK = 1 << 24
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def _text(value: Any) -> str:
    """The value's repr without addresses, so that it is the same in every process."""
    return _ADDRESS.sub("", repr(value))


def _parts(name: str, entry: Any) -> Iterator[tuple[str, Tensor | str]]:
    """The dense tensors and texts of an entry of a state dict, each with a name of its own."""
    if isinstance(entry, (tuple, list)):  # packed parameters of torch.ao
        for i, x in enumerate(entry):
            yield from _parts(f"{name}.{i}", x)
    elif isinstance(entry, Mapping):
        for key in sorted(entry, key=str):
            yield from _parts(f"{name}.{key}", entry[key])
    elif not isinstance(entry, Tensor):
        yield name, _text(entry)
    elif hasattr(entry, "full_tensor"):  # sharded: a collective call, so every process must make it
        yield name, entry.full_tensor()
    elif hasattr(entry, "__tensor_flatten__"):  # of several tensors, as torchao's
        inner, context = entry.__tensor_flatten__()
        yield name, f"{type(entry).__name__} {tuple(entry.shape)} {entry.dtype} {_text(context)}"
        for x in inner:
            yield from _parts(f"{name}.{x}", getattr(entry, x))
    elif entry.is_quantized:
        yield f"{name}.int_repr", entry.int_repr()
        if entry.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
            yield name, f"{entry.dtype} {entry.qscheme()} {entry.q_per_channel_axis()}"
            yield f"{name}.scale", entry.q_per_channel_scales()
            yield f"{name}.zero_point", entry.q_per_channel_zero_points()
        else:
            yield name, f"{entry.dtype} {entry.qscheme()} {entry.q_scale()!r} {entry.q_zero_point()}"
    else:
        yield name, entry


def digest(entries: Mapping[str, Any], *, values: bool = False) -> str:
    """SHA-256 over names, shapes and numbers, in the order of the names.

    Args:
        entries: tensors, and whatever else a state dict holds; of a `functools.partial`, what it returns.
        values: floating-point tensors count by their float32 values, so that the same numbers in bfloat16 and float32
            agree; otherwise by dtype and bytes.
    """
    total = hashlib.sha256()
    for key in sorted(entries):
        entry = entries[key]
        for name, part in _parts(key, entry() if isinstance(entry, partial) else entry):
            if isinstance(part, str):
                total.update(f"{name} {part}\n".encode())
                continue
            tensor = part.detach().as_subclass(Tensor)
            kind = "float" if values and tensor.is_floating_point() else str(tensor.dtype)
            total.update(f"{name} {kind} {tuple(tensor.shape)}\n".encode())
            for piece in tensor.contiguous().flatten().split(_CHUNK):
                piece = piece.float() if kind == "float" else piece
                # A single number counts as contiguous whatever its stride, and `view` asks for 1.
                total.update(piece.cpu().as_strided(piece.shape, (1,)).view(torch.uint8).numpy())
    return total.hexdigest()


def digest_own(model: nn.Module, *, values: bool = False) -> str | None:
    """`digest` of the model's own weights; None if it has none (meta device).

    Weights that accelerate has offloaded are read one at a time.
    """
    entries = {
        name: partial(read, model, name) if isinstance(x, Tensor) and x.is_meta else x
        for name, x in own_entries(model).items()
    }
    try:
        return digest(entries, values=values)
    except InputError:
        return None


def check_description(base: Any, where: str) -> None:
    """Refuses what a file says of a base if `describe_base` cannot have written it.

    Raises:
        InputError: a name, dtype or fingerprint is missing.
    """
    said = base if isinstance(base, Mapping) else {}
    if lacking := [name for name in ("dtype", "fingerprint", "name") if not isinstance(said.get(name), str)]:
        raise InputError(f"{where} does not say the {', '.join(lacking)} of its base: save it again.")


def describe_base(model: nn.Module) -> dict[str, Any] | None:
    """Name, dtype and fingerprint of the model's own weights; None if it has none (meta device).

    Takes one pass over the weights, at 1 to 2 GB a second on a CPU with SHA instructions. `convert` cannot leave this
    until something is saved, as no cheaper check shows whether the weights are still those that were converted: writes
    through `.data` (as in peft's merge) leave the tensor, its memory and its version counter unchanged.
    """
    fingerprint = digest_own(model, values=True)
    if fingerprint is None:
        return None
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    if os.path.exists(name):  # a local folder: its path is nobody else's concern
        name = Path(name).name
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "fingerprint": fingerprint}
