"""Whether a tensor still holds the numbers it held: what is made of weights is kept until they change."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _memcmp() -> Any:
    function = ctypes.CDLL(None).memcmp
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return function


def same_numbers(before: Tensor, now: Tensor) -> bool:
    """Whether two tensors are alike bit for bit: shape, dtype, device, numbers. On the CPU at the speed of memory."""
    if before.shape != now.shape or before.dtype != now.dtype or before.device != now.device:
        return False
    if now.device.type == "cpu" and before.is_contiguous() and now.is_contiguous():
        return _memcmp()(before.data_ptr(), now.data_ptr(), now.nbytes) == 0
    return torch.equal(before, now)
