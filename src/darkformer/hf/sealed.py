"""Safetensors files that carry a JSON header and a checksum over header and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, InputError
from .fingerprint import digest


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header and every tensor's name, type, shape and bytes."""
    return digest(tensors | {json.dumps(header, sort_keys=True): torch.zeros(0)})


def write_sealed(file: Path, kind: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes in one step: a killed run leaves the old file or the new one.

    Args:
        kind: the key of the metadata that holds the header.
        header: plain values, with the file's `layout` and the `version` of darkformer.
        tensors: of any device; what is written are contiguous copies on the CPU.
    """
    # A sign that torch keeps beside the memory would not be written.
    tensors = {name: x.detach().cpu().resolve_neg().contiguous() for name, x in tensors.items()}
    metadata = {"format": "pt", kind: json.dumps(header), "checksum": _checksum(header, tensors)}
    part = file.with_name(file.name + ".part")
    save_file(tensors, part, metadata=metadata)
    part.replace(file)


def read_sealed(
    file: Path, kind: str, layout: int, *, fields: Mapping[str, type], what: str, writer: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that exists.

    Args:
        kind: as in `write_sealed`.
        layout: the highest one that the caller reads.
        fields: what its header has to have, and of which types.
        what, writer: what such a file holds and which function writes it, for messages.

    Raises:
        InputError: damaged, or a file of another kind. ConfigError: a newer version wrote it.
    """
    damaged = f"{file} is damaged (cut short or altered):"
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except MemoryError:
        raise
    except Exception as error:  # whatever safetensors and torch raise on headers that are crafted
        raise InputError(
            f"{file} cannot be read: it is damaged (cut short or altered), or no safetensors file of {what} ({error})."
        ) from error
    if kind not in metadata:
        raise InputError(f"{file} holds no {what}: it was not written by {writer}.")
    try:
        header = json.loads(metadata[kind])
        newest = int(header["layout"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{damaged} its header cannot be read.") from error
    if newest > layout:
        raise ConfigError(
            f"{file} has layout {newest}, this version reads up to {layout}: it was written by darkformer "
            f"{header.get('version')}; upgrade this installation."
        )
    if metadata.get("format") != "pt" or metadata.get("checksum") != _checksum(header, tensors):
        raise InputError(f"{damaged} its checksum does not fit its content.")
    if lacking := [name for name, kind in fields.items() if not isinstance(header.get(name), kind)]:
        raise InputError(f"{damaged} its header lacks {', '.join(lacking)}.")
    return header, tensors
