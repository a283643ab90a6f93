"""Safetensors files that carry a JSON header and a checksum over header and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .fingerprint import digest


def checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header and every tensor's name, type, shape and bytes."""
    return digest(tensors | {json.dumps(header, sort_keys=True): torch.zeros(0)})


def write_sealed(file: Path, kind: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes in one step, the header under `kind`: a killed run leaves the old file or the new one.

    Args:
        tensors: of any device; what is written are contiguous copies on the CPU.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    metadata = {"format": "pt", kind: json.dumps(header), "checksum": checksum(header, tensors)}
    part = file.with_name(file.name + ".part")
    save_file(tensors, part, metadata=metadata)
    part.replace(file)


def read_sealed(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors as they stand in the file; the caller says what a wrong one means to its user.

    Raises:
        SafetensorError, OSError, ValueError: the file cannot be read.
    """
    with safe_open(file, framework="pt") as content:
        return content.metadata() or {}, {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
